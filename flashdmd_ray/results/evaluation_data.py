"""Prompts of an evaluation, and the real images that samples are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.config import Config
from flashdmd_ray.data import ImageSource, build_images
from flashdmd_ray.data.datasets import evaluation_prompts, open_indexed

STREAM = "evaluation"
"""Prompts of a user's data come in the order of this stream."""


@dataclass(frozen=True)
class HeldOut:
    """Digit scenes that no training part has seen: captions, their images, and other images of the same captions.

    images, twins: float32 (N, 3, H, W) in [-1, 1].
    """

    texts: tuple[str, ...]
    images: Tensor
    twins: Tensor


@dataclass(frozen=True)
class Reference:
    """texts: the prompt of each sample. prompts: what they are called.

    reals: real images, batches float32 (<= b, 3, H, W) in [-1, 1] that are read once; none when there are fewer than two.
    twins: real images of the very texts, float32 (N, 3, H, W): what a perfect sampler would draw. None where there are none.
    """

    texts: tuple[str, ...]
    prompts: str
    reals: Iterable[Tensor]
    twins: Tensor | None = None


def has_exact_judge(config: Config) -> bool:
    """True when samples are of held-out digit scenes, whose captions the packaged judge can check."""
    return config.data.source == "demo" and config.evaluation.prompts is None


def choose_prompts(config: Config, count: int, seed: int) -> tuple[str, ...]:
    """`count` prompts of grids or table; see `evaluation.prompts`. A file with fewer starts again.

    seed: chooses digit scenes; all other prompts come in their order. Raises ValueError for prompts that cannot be read.
    """
    if has_exact_judge(config):
        return demo_held_out(count, seed).texts
    path = config.evaluation.prompts
    if path is None:
        return build_images(config.data, config.seed).prompts(STREAM, torch.arange(count))
    index = open_indexed(config.data, evaluation_prompts(path))
    index.tally.check(config.data.max_bad_fraction, f"evaluation.prompts {path}")
    return index.captions(i % len(index) for i in range(count))


def build_reference(config: Config, size: tuple[int, int], seed: int) -> Reference:
    """Prompts and real images for `evaluation.samples` samples of `size` = (H, W). Raises as `choose_prompts`."""
    count = config.evaluation.samples
    if has_exact_judge(config):
        scenes = demo_held_out(count, seed)
        return Reference(scenes.texts, "held-out prompts", (scenes.images,), scenes.twins)
    path = config.evaluation.prompts
    called = "prompts of training" if path is None else f"prompts of {Path(path).name}"
    source = build_images(config.data, config.seed)
    return Reference(choose_prompts(config, count, seed), called, _reals(source, count, size, config.evaluation.batch))


def _reals(source: ImageSource, count: int, size: tuple[int, int], batch: int) -> Iterator[Tensor]:
    """The first `count` real images, or all."""
    count = min(count, len(source))
    for start in range(0, count if count > 1 else 0, batch):
        yield source.reals(torch.arange(start, min(start + batch, count)), size).images


def demo_held_out(count: int, seed: int) -> HeldOut:
    """`count` held-out digit scenes: captions and handwriting that no training part has seen."""
    from flashdmd_ray.demo.scenes import place, render, sample_scenes

    scenes = sample_scenes(count, "held_out", derive_seed(seed, "held-out scenes"))
    rng = np.random.default_rng(derive_seed(seed, "held-out twins"))
    twins = [place(scene.attributes, "held_out", rng) for scene in scenes]
    return HeldOut(tuple(scene.caption for scene in scenes), render(scenes)[0], render(twins)[0])
