"""Interface of a run's data: prompts by position in a stream, and real images by position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flashdmd_ray.data.tally import Tally

if TYPE_CHECKING:  # what indexes and checks data needs no torch
    from torch import Tensor


@dataclass(frozen=True)
class Reals:
    """Captioned real images. images: float32 (B, 3, H, W) in [-1, 1]. replaced: how many of them stand in for a bad one."""

    images: Tensor
    captions: tuple[str, ...]
    replaced: int = 0


@dataclass(frozen=True)
class RealLatents:
    """Captioned real images as latents, float32 (B, C, h, w)."""

    values: Tensor
    captions: tuple[str, ...]
    replaced: int = 0


class ImageSource(Protocol):
    """Prompts and captioned real images, both in an order that is a function of the seed alone."""

    def __len__(self) -> int:
        """Real images in an epoch."""

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        """The prompts at `positions`, int64 (B,), of a stream: each once per epoch, in an order of the stream's own."""

    def reals(self, positions: Tensor, size: tuple[int, int]) -> Reals:
        """The real images at `positions`, int64 (B,), of their one stream, at `size` = (H, W)."""

    def latents(self, positions: Tensor, size: tuple[int, int], encode: Callable[[Tensor], Tensor]) -> RealLatents:
        """The same as latents: stored ones, or `encode(images)`."""

    def report(self) -> Tally:
        """The bad samples that this process met, by name. Empty for a source that cannot have any."""
