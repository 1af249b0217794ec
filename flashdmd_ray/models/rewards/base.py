"""What a reward on decoded images looks like to the rest of the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class PixelReward(Protocol):
    """A frozen model that scores images against their prompts; a higher reward is better."""

    name: str

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,) of `images` float (B, 3, H, W) in [-1, 1], one text each; differentiable in the images.

        A sample's reward does not depend on the rest of the batch.
        """
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the model; returns self."""
        ...


@runtime_checkable
class ImageFeatures(Protocol):
    """A model whose view of an image is a vector."""

    def features(self, images: Tensor) -> Tensor:
        """Vectors of unit length, float32 (B, F), of `images` float (B, 3, H, W) in [-1, 1]."""
        ...
