"""A reward that is easy to hack, for `benchmarks/hack_monitor.py` and the monitor's tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Brightness:
    """Mean of an image's pixels, 0 for black and 1 for white, whatever the prompt says."""

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,) of images float (B, 3, H, W) in [-1, 1]."""
        return (images.float().clamp(-1, 1).mean(dim=(1, 2, 3)) + 1) / 2
