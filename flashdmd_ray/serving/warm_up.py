"""Warm-up of a version before it is served: it generates in every size, and its batch-invariant sizes are measured."""

from __future__ import annotations

import time
from typing import Any

import torch

from flashdmd_ray.serving.batch_invariance import invariant_sizes, shapes_of
from flashdmd_ray.serving.messages import Size
from flashdmd_ray.serving.model_loading import ModelVersion
from flashdmd_ray.serving.step_sampler import Sample, StepSampler, StudentSampler

PROMPT, SEED = "a rehearsal", 7


class WarmUp:
    """Warms up versions. Measured sizes are remembered, since a new version of a model has the shapes of the old one."""

    def __init__(self, max_batch: int) -> None:
        """max_batch: samples in one forward."""
        self._max_batch = max_batch
        self._measured: dict[Any, tuple[tuple[int, ...], float]] = {}

    def __call__(self, version: ModelVersion) -> None:
        """Generate with every sampler of `version`. Raises ValueError when one cannot, or when its latents are not finite."""
        for name, sampler in version.samplers.items():
            sampler.encodes_groups = _encodes_groups(sampler)
            for size in version.infos[name].sizes:
                sampler.batch_sizes[size], sampler.step_s[size] = self._measure(sampler, size)
            _generate(name, sampler, sampler.step_counts[0] if isinstance(sampler, StudentSampler) else 2)

    def _measure(self, sampler: StepSampler, size: Size) -> tuple[tuple[int, ...], float]:
        """Measure the batch-invariant sizes, and the seconds of a step of one sample in the batch where it takes least."""
        modules = {"network": sampler.network.network, "vae": sampler.family.vae}
        key = (type(sampler), size, sampler.family.device, shapes_of(modules))
        if key not in self._measured:
            seconds: list[float] = []
            sizes = invariant_sizes(lambda count: _bits(sampler, size, count, seconds), self._max_batch)
            self._measured[key] = (sizes, min(seconds))
        return self._measured[key]


def _bits(sampler: StepSampler, size: Size, count: int, seconds: list[float]) -> bytes | None:
    """Return the bits of one sample after one step in a batch of `count`; None when they differ between its first and last place.

    Appends the seconds of the step for each sample to `seconds`.
    """
    seeds = [SEED, *range(count - 2), SEED][:count]
    samples = [sampler.begin(PROMPT, seed, 1, size) for seed in seeds]
    began = time.perf_counter()
    latents = sampler.step(samples)
    seconds.append((time.perf_counter() - began) / count)
    done = [Sample(s.conditioning, s.generator, s.timesteps, row, 1) for s, row in zip(samples, latents, strict=True)]
    images = sampler.pixels(done)
    same = torch.equal(latents[0], latents[-1]) and torch.equal(images[0], images[-1])
    return latents[0].cpu().numpy().tobytes() + images[0].numpy().tobytes() if same else None


@torch.no_grad()
def _encodes_groups(sampler: StepSampler) -> bool:
    """Tell whether a prompt's embedding has the same bits at any place of an encoder's group."""
    towers = sampler.family.text
    others = [f"{PROMPT} {i}" for i in range(towers.GROUP - 1)]
    first, last = towers.encode_group([PROMPT, *others]), towers.encode_group([*others, PROMPT])
    alone = towers.encode_group([PROMPT, *[""] * len(others)])
    return all(torch.equal(a[0], b[-1]) and torch.equal(a[0], c[0]) for a, b, c in zip(first, last, alone, strict=True))


def _generate(name: str, sampler: StepSampler, steps: int) -> None:
    sample = sampler.begin(PROMPT, SEED, steps, sampler.family.image_size)
    while not sample.finished:
        sampler.advance([sample])
    if not bool(torch.isfinite(sample.noisy).all()):
        raise ValueError(f"{name} draws values that are not finite: its weights are damaged; export it again")
    sampler.decode([sample])
