"""Images from prompts: the noise of each sample, the teacher's sampler and the few-step generator's.

The roles that hold the networks make sample grids with these; the report at the end of a run makes its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.data.executor import in_threads
from flashdmd_ray.diffusion.sampling import NoiseSampler, ddim_sample, few_step_sample, guided
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.labels import student_label, teacher_label
from flashdmd_ray.roles.networks import x0_predictor


class SampleNoise:
    """Noise sampler of samples `indices` (global positions): k -> the k-th draw of each sample's own generator.

    It depends on (seed, index, k) alone, not on the batch, and it is what a diffusers pipeline draws when it is given
    `generator=[torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]`. Ask for k = 0, 1, 2, ... in turn.
    """

    def __init__(self, indices: Sequence[int], shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]
        self._shape = shape
        self._device = device
        self._next = 0

    def __call__(self, k: int) -> Tensor:
        assert k == self._next, f"noise {k} was asked for when {self._next} is next"
        self._next += 1
        rows = [torch.randn(self._shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device)


def seed_of(seed: int, index: int) -> int:
    """Seed of sample `index` in an evaluation with `seed`."""
    return derive_seed(seed, "evaluation", index)


@dataclass(frozen=True)
class Sampler:
    """A named way to make samples. sample(conditioning of B prompts, draw_noise) -> clean latents float32 (B, C, h, w).

    nfe: network forwards per sample.
    """

    name: str
    nfe: int
    sample: Callable[[Conditioning, NoiseSampler], Tensor]


def teacher_sampler(family: Family, steps: int, guidance_scale: float) -> Sampler:
    """The frozen teacher, deterministic, with classifier-free guidance (two forwards per step unless the scale is 1)."""

    def sample(conditioning: Conditioning, noise_sampler: NoiseSampler) -> Tensor:
        unconditional = family.unconditional(len(conditioning))
        predict_x0 = guided(
            x0_predictor(family.teacher, family.schedule, conditioning),
            x0_predictor(family.teacher, family.schedule, unconditional),
            guidance_scale,
        )
        return ddim_sample(predict_x0, family.schedule, steps, noise_sampler(0))

    return Sampler(teacher_label(steps, guidance_scale), steps * (1 if guidance_scale == 1 else 2), sample)


def student_sampler(name: str, family: Family, network: Callable[..., Tensor], timesteps: Sequence[int]) -> Sampler:
    """A few-step generator without guidance. With the teacher as `network` it is the student before distillation."""

    def sample(conditioning: Conditioning, noise_sampler: NoiseSampler) -> Tensor:
        return few_step_sample(
            x0_predictor(network, family.schedule, conditioning), family.schedule, timesteps, noise_sampler
        )

    return Sampler(student_label(name, timesteps), len(timesteps), sample)


def sample_images(
    family: Family,
    sampler: Sampler,
    texts: Sequence[str],
    indices: Sequence[int],
    seed: int,
    batch: int,
    at_once: int = 1,
) -> Iterator[Tensor]:
    """Images float32 (<= batch, 3, H, W) in [-1, 1], on the CPU, batch after batch; sample i uses noise `indices[i]`.

    at_once: batches that are drawn at the same time, each in a thread; their images are the same.
    """

    @torch.no_grad()
    def draw(start: int) -> Tensor:
        chunk = slice(start, start + batch)
        noise_sampler = SampleNoise(indices[chunk], family.latent_shape, seed, family.device)
        latents = sampler.sample(family.encode(texts[chunk]), noise_sampler)
        return family.decode(latents).clamp(-1, 1).cpu()

    starts = range(0, len(texts), batch)
    return map(draw, starts) if at_once == 1 else in_threads(lambda: draw, starts, at_once)


def sample_all_images(
    family: Family, sampler: Sampler, texts: Sequence[str], indices: Sequence[int], seed: int, batch: int
) -> Tensor:
    """The images of `sample_images` in one tensor, float32 (N, 3, H, W)."""
    return torch.cat(list(sample_images(family, sampler, texts, indices, seed, batch)))
