"""Forward processes: how an image is noised, and how a network's output becomes x0.

Both families are written the same way,

    x_t = a_t x0 + s_t e,        e ~ N(0, I),

and differ only in (a_t, s_t) and in what the network predicts. All arithmetic is in float32, or in float64 where an input is; the
conversion x0 = (x_t - s_t e) / a_t multiplies an error by 14.6 at t = 999 of SDXL, which bfloat16 does not survive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashdmd_ray.catalog.schedulers import forward_process


class NoiseSchedule(ABC):
    """x_t = a_t x0 + s_t e on the teacher's training timesteps 0 .. num_timesteps-1, and the network's parameterisation of it.

    a, s: float32 (num_timesteps,). Timesteps are int64 (B,); latents, noise and predictions are (B, ...) of one floating type, widened
    to float32 before anything is computed. A timestep outside the schedule raises RuntimeError (torch's).
    """

    prediction_type: str
    """What the network predicts: "epsilon" (e), "v_prediction" (a e - s x0) or "flow" (e - x0)."""

    def __init__(self, a: Tensor, s: Tensor) -> None:
        assert a.shape == s.shape == (len(a),), "one pair of coefficients per training timestep"
        self.num_timesteps = len(a)
        self._tables = {torch.device("cpu"): torch.stack([a, s]).float().cpu()}

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t), each float32 (B,), on the device of `t`."""
        assert (t.dtype, t.ndim) == (torch.int64, 1), f"timesteps are int64 (B,), got {t.dtype} {tuple(t.shape)}"
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        # index_select, unlike t[...], refuses a negative timestep instead of counting from the end.
        a, s = self._tables[t.device].index_select(1, t)
        return a, s

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process x_t = a_t x0 + s_t e, (B, ...)."""
        a, s = self._coefficients_like(x0, t)
        return a * upcast(x0) + s * upcast(noise)

    @abstractmethod
    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The clean latent that a network's `prediction` at `noisy` = x_t stands for, (B, ...)."""

    @abstractmethod
    def to_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise e that a network's `prediction` at `noisy` = x_t stands for, (B, ...)."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Regression target at x_t in the network's own parameterisation, (B, ...)."""

    @abstractmethod
    def network_timestep(self, t: Tensor) -> Tensor:
        """The number the network is conditioned on, (B,), for training timestep `t`."""

    @property
    @abstractmethod
    def final_coefficients(self) -> tuple[float, float]:
        """(a, s) that the deterministic sampler ends on after its last timestep; (1, 0) is the clean latent."""

    def _coefficients_like(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert len(t) == len(x), f"{len(t)} timesteps for a batch of {len(x)}"
        a, s = self.coefficients(t)
        shape = (-1, *[1] * (x.ndim - 1))
        return a.reshape(shape), s.reshape(shape)


class VPSchedule(NoiseSchedule):
    """Variance preserving (SDXL, SD1.5): a_t^2 = alphas_cumprod[t], s_t^2 = 1 - a_t^2, with eps- or v-prediction.

    alphas_cumprod: float (num_timesteps,). final_alpha_cumprod: a^2 after the last DDIM step (1 ends on the clean latent).
    Raises ValueError for another prediction type, and for eps-prediction on a schedule that ends at zero signal, where eps says
    nothing about x0.
    """

    def __init__(
        self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", final_alpha_cumprod: float = 1.0
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"scheduler prediction_type '{prediction_type}' is not supported; use 'epsilon' or 'v_prediction'"
            )
        if prediction_type == "epsilon" and bool((alphas_cumprod <= 0).any()):
            raise ValueError(
                "rescale_betas_zero_snr needs a v-prediction network: at zero signal eps says nothing about x0"
            )
        alphas_cumprod = alphas_cumprod.float()
        super().__init__(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())
        self.prediction_type = prediction_type
        self.final_alpha_cumprod = final_alpha_cumprod

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VPSchedule:
        """From the config of any diffusers scheduler with betas, as `DDIMScheduler.from_config` reads it.

        `set_alpha_to_one: false` ends the deterministic sampler at alphas_cumprod[0] instead of 1, as there. Clipping and thresholding
        of x0 are for pixel models and never done. Raises ValueError when the config has no betas.
        """
        from diffusers import DDPMScheduler  # slow to import, and only needed where a pipeline is read

        forward_process(config)
        alphas_cumprod = DDPMScheduler.from_config(dict(config)).alphas_cumprod
        final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0])
        return cls(alphas_cumprod, config.get("prediction_type", "epsilon"), final)

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """eps: x0 = (x_t - s e) / a;  v: x0 = a x_t - s v."""
        a, s = self._coefficients_like(noisy, t)
        prediction, noisy = upcast(prediction), upcast(noisy)
        return (noisy - s * prediction) / a if self.prediction_type == "epsilon" else a * noisy - s * prediction

    def to_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """eps: e = prediction;  v: e = a v + s x_t."""
        if self.prediction_type == "epsilon":
            return upcast(prediction)
        a, s = self._coefficients_like(noisy, t)
        return a * upcast(prediction) + s * upcast(noisy)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps: e;  v: a e - s x0."""
        if self.prediction_type == "epsilon":
            return upcast(noise)
        a, s = self._coefficients_like(x0, t)
        return a * upcast(noise) - s * upcast(x0)

    def network_timestep(self, t: Tensor) -> Tensor:
        """The training timestep itself, int64 (B,)."""
        return t

    @property
    def final_coefficients(self) -> tuple[float, float]:
        """sqrt of (final_alpha_cumprod, 1 - final_alpha_cumprod)."""
        return self.final_alpha_cumprod**0.5, (1 - self.final_alpha_cumprod) ** 0.5


class FlowSchedule(NoiseSchedule):
    """Rectified flow (SD3): x_t = (1 - s) x0 + s e, velocity v = e - x0, on the teacher's shifted noise levels

        u = (t + 1) / num_timesteps,   s = shift u / (1 + (shift - 1) u).

    Raises ValueError when `shift` is not positive.
    """

    prediction_type = "flow"

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000) -> None:
        if not shift > 0:
            raise ValueError(f"scheduler shift must be positive, got {shift}")
        u = torch.arange(1, num_timesteps + 1, dtype=torch.float32) / num_timesteps
        sigma = shift * u / (1 + (shift - 1) * u)
        super().__init__(1 - sigma, sigma)
        self.shift = shift

    def to_x0(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """x0 = x_t - s v."""
        _, s = self._coefficients_like(noisy, t)
        return upcast(noisy) - s * upcast(prediction)

    def to_noise(self, prediction: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
        """e = x_t + (1 - s) v."""
        a, _ = self._coefficients_like(noisy, t)
        return upcast(noisy) + a * upcast(prediction)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = e - x0."""
        return upcast(noise) - upcast(x0)

    def network_timestep(self, t: Tensor) -> Tensor:
        """num_timesteps * s_t, float32 (B,): flow networks are conditioned on their noise level."""
        return self.coefficients(t)[1] * self.num_timesteps

    @property
    def final_coefficients(self) -> tuple[float, float]:
        """The clean latent."""
        return 1.0, 0.0


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule behind a diffusers scheduler config (`pipe.scheduler.config` or its JSON), whatever its sampler.

    Flow-matching schedulers give a FlowSchedule, all others with betas a VPSchedule. Raises ValueError for schedules that depend on
    the resolution (`use_dynamic_shifting`) and for those that are neither.
    """
    if forward_process(config) == "flow":
        return FlowSchedule(float(config["shift"]), int(config.get("num_train_timesteps", 1000)))
    return VPSchedule.from_config(config)


def upcast(x: Tensor) -> Tensor:
    """float64 stays, every other type becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
