"""Networks that draw, one denoising step at a time: a student by its few-step hops, a teacher by guided deterministic steps.

Every sample of a batch has its own timestep, noise and prompt, so samples that began at different times share forwards.
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from flashdmd_ray.diffusion.sampling import guided, trailing_timesteps
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.networks import x0_predictor
from flashdmd_ray.serving.numerics import filled_size

Size = tuple[int, int]
"""(height, width) in pixels."""


ENCODING = threading.Lock()
"""The cache of embeddings is for one thread at a time; a new version on a shared base is rehearsed beside the drawing."""


@dataclasses.dataclass
class Sample:
    """One image on its way. noisy: float32 (C, h, w), before step `done` of `timesteps`; clean latents when all are done."""

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
        return self.timesteps[self.done]

    def copy(self) -> Sample:
        """The same sample, with a generator of its own in the same state."""
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        return dataclasses.replace(self, generator=generator)


class Artist(ABC):
    """One network on its family's text encoders, VAE and schedule."""

    def __init__(self, family: Family, network: Denoiser) -> None:
        self.family = family
        self.network = network
        self.schedule = family.schedule
        self.reads_groups = False
        """Whether a prompt's embedding was found to have the same bits at any place of an encoder's group."""
        self.batches: dict[Size, tuple[int, ...]] = {}
        """By image size, the batch sizes that give a sample the same bits (`numerics.agreeing_sizes`), ascending. Others are filled up."""

    @abstractmethod
    def timesteps(self, steps: int) -> tuple[int, ...]:
        """Those of a drawing in `steps` steps, descending."""

    @abstractmethod
    def _next(self, samples: Sequence[Sample], noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """What the samples are after their step, float32 (B, C, h, w), from `noisy` of that shape."""

    def begin(self, prompt: str, seed: int, steps: int, size: Size) -> Sample:
        """A sample that is pure noise. Its numbers are those of a stock pipeline given `torch.Generator().manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        noisy = self._noise(generator, size)
        return Sample(self.conditioning(prompt, size), generator, self.timesteps(steps), noisy)

    def read(self, prompts: Sequence[str]) -> None:
        """Encode prompts that will soon be drawn: together, where the place in a group of prompts makes no difference."""
        if prompts and self.reads_groups:
            with ENCODING:
                self.family.encode(list(dict.fromkeys(prompts)))

    def most(self, size: Size) -> int:
        """Samples of an image size in one forward; 1 where nothing was measured."""
        return self.batches.get(size, (1,))[-1]

    def advance(self, samples: Sequence[Sample]) -> None:
        """One denoising step of each sample: at most `most`, all of one image size, none finished."""
        rows = self.step(self._fill(samples))
        for sample, row in zip(samples, rows, strict=False):
            sample.noisy = row
            sample.done += 1

    def decode(self, samples: Sequence[Sample]) -> Tensor:
        """Pixels uint8 (B, H, W, 3), on the CPU, of at most `most` finished samples of one image size."""
        return self.pixels(self._fill(samples))[: len(samples)]

    @torch.inference_mode()  # a lone sample takes 5 % less time than with no_grad
    def step(self, samples: Sequence[Sample]) -> Tensor:
        """What the samples are after their next step, float32 (B, C, h, w): one forward of just this batch. Draws their noise."""
        noisy = torch.stack([sample.noisy for sample in samples])
        timesteps = torch.tensor([sample.timestep for sample in samples], device=noisy.device)
        return self._next(samples, noisy, timesteps, Conditioning.concat([sample.conditioning for sample in samples]))

    @torch.inference_mode()
    def pixels(self, samples: Sequence[Sample]) -> Tensor:
        """As `decode`, of just this batch."""
        images = self.family.decode(torch.stack([sample.noisy for sample in samples]))
        # As diffusers makes them: to [0, 1] first.
        return (images / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def _fill(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, and copies of the last one up to a batch size that was found to agree."""
        size = filled_size(len(samples), self.batches.get(self._image_size(samples[0]), (1,)))
        extra = [samples[-1].copy() for _ in range(size - len(samples))]
        return [*samples, *extra]

    def _image_size(self, sample: Sample) -> Size:
        return (sample.noisy.shape[1] * self.scale, sample.noisy.shape[2] * self.scale)

    @property
    def scale(self) -> int:
        """Pixels that a latent spans."""
        return self.family.image_size[0] // self.family.latent_shape[1]

    def conditioning(self, prompt: str, size: Size) -> Conditioning:
        """Of one prompt, one row; embeddings are cached by prompt."""
        with ENCODING:
            encoded = self.family.encode([prompt])
        return resized(self.family, encoded, size)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return (self.family.latent_shape[0], size[0] // self.scale, size[1] // self.scale)

    def _noise(self, generator: torch.Generator, size: Size) -> Tensor:
        # With the batch dimension, as pipelines draw it.
        return torch.randn((1, *self.latent_shape(size)), generator=generator)[0].to(self.family.device)


class Student(Artist):
    """A few-step generator: x0 from each forward, then a hop to the next timestep with fresh noise."""

    def __init__(self, family: Family, network: Denoiser, trained: Sequence[int]) -> None:
        """trained: the denoising timesteps of training, descending."""
        super().__init__(family, network)
        self.trained = tuple(trained)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Numbers of steps it can draw in: divisors of the trained number, that one first."""
        count = len(self.trained)
        return tuple(n for n in range(count, 0, -1) if count % n == 0)

    def timesteps(self, steps: int) -> tuple[int, ...]:
        return self.trained[:: len(self.trained) // steps]

    def _next(self, samples: Sequence[Sample], noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        x0 = x0_predictor(self.network, self.schedule, conditioning)(noisy, timesteps)
        going_on = [i for i, sample in enumerate(samples) if sample.done + 1 < len(sample.timesteps)]
        if not going_on:
            return x0
        following = [samples[i].timesteps[samples[i].done + 1] for i in going_on]
        noise = torch.stack([torch.randn(tuple(noisy.shape[1:]), generator=samples[i].generator) for i in going_on])
        hopped = self.schedule.add_noise(x0[going_on], noise.to(x0.device), torch.tensor(following, device=x0.device))
        x0 = x0.clone()
        x0[going_on] = hopped
        return x0


class Teacher(Artist):
    """The frozen base of a student: DDIM (or Euler on a flow) with classifier-free guidance, as `ddim_sample`."""

    def __init__(self, family: Family, network: Denoiser, guidance_scale: float) -> None:
        super().__init__(family, network)
        self.guidance_scale = guidance_scale

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
        a, s = self._column(self.schedule.coefficients(timesteps))
        a_next, s_next = self._column(self._next_coefficients(samples, noisy.device))
        return a_next * x0 + s_next * ((noisy - a * x0) / s)

    def _next_coefficients(self, samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
        last = [sample.done + 1 == len(sample.timesteps) for sample in samples]
        following = [0 if end else s.timesteps[s.done + 1] for end, s in zip(last, samples, strict=True)]
        a, s = self.schedule.coefficients(torch.tensor(following, device=device))
        final_a, final_s = self.schedule.final_coefficients
        ends = torch.tensor(last, device=device)
        return a.masked_fill(ends, final_a), s.masked_fill(ends, final_s)

    @staticmethod
    def _column(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, s = pair
        return a[:, None, None, None], s[:, None, None, None]


def resized(family: Family, conditioning: Conditioning, size: Size) -> Conditioning:
    """The conditioning for images of `size`: SDXL's micro-conditioning as the stock pipeline fills it in for that size."""
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
