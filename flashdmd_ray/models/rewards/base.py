"""Interface of the rewards on decoded images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from flashdmd_ray.config import RewardConfig


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


class BatchedReward(nn.Module, ABC):
    """A `PixelReward` that looks at no more than `batch` images at a time, however many it is given.

    The one place where a reward's memory is bounded: kinds implement `score_batch`.
    """

    name: str = ""
    batch: int | None = None
    """None: all at once."""

    @abstractmethod
    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """See `PixelReward.score`; all images at once."""

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """See `PixelReward.score`."""
        assert len(images) == len(texts), f"{len(images)} images for {len(texts)} texts"
        size = self.batch or max(1, len(texts))
        starts = range(0, len(texts), size)
        parts = [self.score_batch(images[i : i + size], texts[i : i + size]) for i in starts]
        return torch.cat(parts) if parts else torch.zeros(0)


def dtype_of(settings: RewardConfig) -> torch.dtype:
    """The type that the configuration gives a reward's weights and activations."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def unique_rows(texts: Sequence[str], device: torch.device) -> tuple[list[str], Tensor]:
    """Distinct texts, and for each text its row among them, int64 (B,): the candidates of a group share their prompt."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return list(places), torch.tensor([places[text] for text in texts], device=device)
