"""Samplers that go one denoising step at a time: the student's few-step hops, the teacher's guided deterministic steps.

Every sample of a batch has its own timestep, noise and prompt, so samples that began at different times share forwards.
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flashdmd_ray.diffusion.sampling import ddim_step, guided, renoise, trailing_timesteps
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.networks import x0_predictor
from flashdmd_ray.serving.batch_invariance import filled_size
from flashdmd_ray.serving.messages import Size

ENCODING = threading.Lock()
"""Held while prompts are encoded: the cache of embeddings is for one thread, and a new version on a shared base warms up beside."""


@dataclasses.dataclass
class Sample:
    """One image on its way.

    noisy: float32 (C, h, w), the latents before step `done` of `timesteps`; clean latents when all steps are done.
    """

    conditioning: Conditioning
    generator: torch.Generator
    timesteps: tuple[int, ...]
    noisy: Tensor
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.timesteps)

    @property
    def timestep(self) -> int:
        """Timestep of the next step."""
        return self.timesteps[self.done]

    @property
    def is_last_step(self) -> bool:
        return self.done + 1 == len(self.timesteps)

    @property
    def following(self) -> int:
        """Timestep after the next step; not for the last step."""
        return self.timesteps[self.done + 1]

    def copy(self) -> Sample:
        """Copy the sample, with a generator of its own in the same state."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return dataclasses.replace(self, generator=generator)


class StepSampler(ABC):
    """One network on its family's text encoders, VAE and schedule."""

    def __init__(self, family: Family, network: Denoiser) -> None:
        self.family = family
        self.network = network
        self.schedule = family.schedule
        self.encodes_groups = False
        """Whether a prompt's embedding was measured to have the same bits at any place of an encoder's group."""
        self.batch_sizes: dict[Size, tuple[int, ...]] = {}
        """By image size, the batch sizes that give a sample the same bits (`batch_invariance.invariant_sizes`), ascending."""
        self.step_s: dict[Size, float] = {}
        """By image size, the measured seconds of one step of one sample in a large batch."""

    @property
    def forwards_per_step(self) -> int:
        """Forwards of the network for one step of a sample."""
        return 1

    @abstractmethod
    def timesteps(self, steps: int) -> tuple[int, ...]:
        """Return the timesteps of sampling in `steps` steps, descending."""

    @abstractmethod
    def _next(self, samples: Sequence[Sample], noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Advance `noisy` (B, C, h, w) by one denoising step of each sample; float32 of the same shape."""

    def begin(self, prompt: str, seed: int, steps: int, size: Size) -> Sample:
        """Make a sample that is pure noise: the numbers of a stock pipeline given `torch.Generator().manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        noisy = self._noise(generator, size)
        return Sample(self.conditioning(prompt, size), generator, self.timesteps(steps), noisy)

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts that are needed soon in one group, where the place in a group makes no difference."""
        if prompts and self.encodes_groups:
            with ENCODING:
                self.family.encode(list(dict.fromkeys(prompts)))

    def max_batch(self, size: Size) -> int:
        """Return how many samples of an image size fit in one forward; 1 where nothing was measured."""
        return self.batch_sizes.get(size, (1,))[-1]

    def advance(self, samples: Sequence[Sample]) -> None:
        """Make one denoising step of each sample: at most `max_batch`, all of one image size, none finished."""
        rows = self.step(self._fill(samples))
        for sample, row in zip(samples, rows, strict=False):
            sample.noisy = row
            sample.done += 1

    def decode(self, samples: Sequence[Sample]) -> Tensor:
        """Decode at most `max_batch` finished samples of one image size: uint8 (B, H, W, 3) on the CPU."""
        return self.pixels(self._fill(samples))[: len(samples)]

    @torch.inference_mode()  # a lone sample takes 5 % less time than with no_grad
    def step(self, samples: Sequence[Sample]) -> Tensor:
        """Return the samples after their next step, float32 (B, C, h, w), by one forward of just this batch.

        Takes their noise from their generators; changes nothing else in them.
        """
        noisy = torch.stack([sample.noisy for sample in samples])
        timesteps = torch.tensor([sample.timestep for sample in samples], device=noisy.device)
        return self._next(samples, noisy, timesteps, Conditioning.concat([sample.conditioning for sample in samples]))

    @torch.inference_mode()
    def pixels(self, samples: Sequence[Sample]) -> Tensor:
        """Decode as `decode` does, in just this batch."""
        images = self.family.decode(torch.stack([sample.noisy for sample in samples]))
        # As diffusers makes them: to [0, 1] first.
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def _fill(self, samples: Sequence[Sample]) -> list[Sample]:
        """Add copies of the last sample up to a batch size that was measured to agree."""
        size = filled_size(len(samples), self.batch_sizes.get(self._image_size(samples[0]), (1,)))
        return [*samples, *(samples[-1].copy() for _ in range(size - len(samples)))]

    def _image_size(self, sample: Sample) -> Size:
        return (sample.noisy.shape[1] * self.scale, sample.noisy.shape[2] * self.scale)

    @property
    def scale(self) -> int:
        """Pixels along one side of a latent."""
        return self.family.image_size[0] // self.family.latent_shape[1]

    def conditioning(self, prompt: str, size: Size) -> Conditioning:
        """Return one prompt's conditioning, of one row; embeddings are cached by prompt."""
        with ENCODING:
            encoded = self.family.encode([prompt])
        return resized(self.family, encoded, size)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Return (C, h, w) of an image size's latents."""
        return (self.family.latent_shape[0], size[0] // self.scale, size[1] // self.scale)

    def _noise(self, generator: torch.Generator, size: Size) -> Tensor:
        # With the batch dimension, as pipelines draw it.
        return torch.randn((1, *self.latent_shape(size)), generator=generator)[0].to(self.family.device)


class StudentSampler(StepSampler):
    """A few-step generator: x0 from each forward, renoised to the next timestep."""

    def __init__(self, family: Family, network: Denoiser, trained: Sequence[int]) -> None:
        """trained: the denoising timesteps of training, descending."""
        super().__init__(family, network)
        self.trained = tuple(trained)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps it can sample in: divisors of the trained number, that one first."""
        count = len(self.trained)
        return tuple(n for n in range(count, 0, -1) if count % n == 0)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        return self.trained[:: len(self.trained) // steps]

    def _next(self, samples: Sequence[Sample], noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        x0 = x0_predictor(self.network, self.schedule, conditioning)(noisy, timesteps)
        rows = [i for i, sample in enumerate(samples) if not sample.is_last_step]
        if not rows:
            return x0
        following = torch.tensor([samples[i].following for i in rows], device=x0.device)
        noise = torch.stack([torch.randn(tuple(noisy.shape[1:]), generator=samples[i].generator) for i in rows])
        result = x0.clone()
        result[rows] = renoise(self.schedule, x0[rows], following, noise.to(x0.device))
        return result


class TeacherSampler(StepSampler):
    """The frozen base of a student: DDIM (Euler on a flow) with classifier-free guidance, as `sampling.ddim_sample`."""

    def __init__(self, family: Family, network: Denoiser, guidance_scale: float) -> None:
        super().__init__(family, network)
        self.guidance_scale = guidance_scale

    @property
    def forwards_per_step(self) -> int:
        return 1 if self.guidance_scale == 1 else 2

    def timesteps(self, steps: int) -> tuple[int, ...]:
        return trailing_timesteps(steps, self.schedule.num_timesteps)

    def _next(self, samples: Sequence[Sample], noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        size = self._image_size(samples[0])
        with ENCODING:
            unconditional = resized(self.family, self.family.unconditional(len(samples)), size)
        predict_x0 = guided(
            x0_predictor(self.network, self.schedule, conditioning),
            x0_predictor(self.network, self.schedule, unconditional),
            self.guidance_scale,
        )
        x0 = predict_x0(noisy, timesteps)
        current = _columns(*self.schedule.coefficients(timesteps))
        return ddim_step(noisy, x0, current, _columns(*self._next_coefficients(samples, noisy.device)))

    def _next_coefficients(self, samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([sample.is_last_step for sample in samples], device=device)
        following = [0 if sample.is_last_step else sample.following for sample in samples]
        a, s = self.schedule.coefficients(torch.tensor(following, device=device))
        final_a, final_s = self.schedule.final_coefficients
        return a.masked_fill(ends, final_a), s.masked_fill(ends, final_s)


def _columns(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape coefficients (B,) to (B, 1, 1, 1)."""
    return a[:, None, None, None], s[:, None, None, None]


def resized(family: Family, conditioning: Conditioning, size: Size) -> Conditioning:
    """Set SDXL's micro-conditioning for images of `size`, as the stock pipeline fills it in for that size."""
    if conditioning.time_ids is None or size == family.image_size:
        return conditioning
    own = torch.tensor([*family.image_size], dtype=torch.float32, device=conditioning.time_ids.device)
    new = torch.tensor([*size], dtype=torch.float32, device=conditioning.time_ids.device)
    original = conditioning.time_ids[:, :2]
    original = torch.where((original == own).all(1, keepdim=True), new, original)
    rows = len(conditioning)
    return dataclasses.replace(
        conditioning,
        time_ids=torch.cat([original, conditioning.time_ids[:, 2:4], new.repeat(rows, 1)], dim=1),
    )
