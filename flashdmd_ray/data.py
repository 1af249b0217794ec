"""Prompts and real images, by index. The driver draws the indices, so a data position is just the step."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

from torch import Tensor

from flashdmd_ray.config import DataConfig


class ImageSource(Protocol):
    """Captioned real images."""

    def __len__(self) -> int: ...

    def prompts(self, indices: Tensor) -> tuple[str, ...]:
        """The captions at `indices`, int64 (B,)."""

    def images(self, indices: Tensor) -> Tensor:
        """The images at `indices`: float32 (B, 3, H, W) in [-1, 1]."""


class DemoScenes:
    """Digit scenes of the train split, composed when asked for."""

    def __init__(self, count: int, seed: int):
        from flashdmd_ray.demo.scenes import sample_scenes

        self._scenes = sample_scenes(count, "train", seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def prompts(self, indices: Tensor) -> tuple[str, ...]:
        return tuple(self._scenes[i].caption for i in indices.tolist())

    def images(self, indices: Tensor) -> Tensor:
        from flashdmd_ray.demo.scenes import render

        return render([self._scenes[i] for i in indices.tolist()])[0]


@lru_cache(maxsize=1)
def build_images(config: DataConfig, seed: int) -> ImageSource:
    """The data source of the configuration, made once per process."""
    return DemoScenes(config.scenes, seed)
