"""Gaussian data N(mean, std^2 I): the one world in which every denoiser, hence every objective, has a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdmd_ray.diffusion.sampling import PredictX0
from flashdmd_ray.diffusion.schedule import FlowSchedule, NoiseSchedule, VPSchedule, schedule_from_config

SDXL_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "clip_sample": False,
}


def vp(prediction_type: str = "epsilon", **changes: object) -> VPSchedule:
    schedule = schedule_from_config(SDXL_SCHEDULER | {"prediction_type": prediction_type} | changes)
    assert isinstance(schedule, VPSchedule)
    return schedule


FAMILIES: dict[str, NoiseSchedule] = {"eps": vp("epsilon"), "v": vp("v_prediction"), "flow": FlowSchedule(shift=3.0)}


@dataclass(frozen=True)
class Gaussian:
    mean: float
    std: float

    def sample(self, shape: tuple[int, ...], seed: int) -> Tensor:
        return self.mean + self.std * normal(shape, seed)

    def denoiser(self, schedule: NoiseSchedule) -> PredictX0:
        """E[x0 | x_t] = m + a c^2 / (a^2 c^2 + s^2) (x_t - a m): what a perfectly trained denoiser answers."""

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            a, s = (c.reshape(-1, 1, 1, 1) for c in schedule.coefficients(t))
            return self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (noisy - a * self.mean)

        return predict

    def transport(self, schedule: NoiseSchedule) -> PredictX0:
        """x0 = m + c (x_t - a m) / sqrt(a^2 c^2 + s^2): a perfect one-step generator, which maps the marginal at t onto the data."""

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            a, s = (c.reshape(-1, 1, 1, 1) for c in schedule.coefficients(t))
            return self.mean + self.std * (noisy - a * self.mean) / (a**2 * self.std**2 + s**2).sqrt()

        return predict


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(t: int, count: int) -> Tensor:
    return torch.full((count,), t, dtype=torch.int64)
