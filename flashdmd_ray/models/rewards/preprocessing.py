"""CLIP's image pre-processing as differentiable tensor operations: the stock processors cut the gradient to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor

_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processor configurations store them


class ClipPreprocessing(nn.Module):
    """Resize the shortest edge with antialiasing, crop the centre, normalise: as `CLIPImageProcessor` does."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shortest_edge: int,
        crop: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        mode: str = "bicubic",
    ) -> None:
        super().__init__()
        self.shortest_edge = shortest_edge
        self.crop = crop
        self.mode = mode
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @classmethod
    def from_processor(cls, processor: CLIPImageProcessor) -> Self:
        """The same steps as a stock processor. Raises ValueError for settings that are not CLIP's form."""
        size, crop = processor.size, processor.crop_size
        if not size["shortest_edge"] or not (
            processor.do_center_crop and processor.do_resize and processor.do_normalize
        ):
            raise ValueError("its image processor is not CLIP's: it must resize the shortest edge, crop and normalise")
        if int(processor.resample) not in _RESAMPLING:
            raise ValueError(
                f"its image processor resamples by filter {processor.resample}: only bilinear and bicubic are known"
            )
        mode = _RESAMPLING[int(processor.resample)]
        shape = (int(crop["height"]), int(crop["width"]))
        return cls(int(size["shortest_edge"]), shape, processor.image_mean, processor.image_std, mode)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels float32 (B, 3, *crop) of `images` float (B, 3, H, W) in [-1, 1]; values outside are clamped."""
        pixels = (images.float().clamp(-1, 1) + 1) / 2
        height, width = pixels.shape[-2:]
        scale = self.shortest_edge / min(height, width)
        if scale != 1:
            size = (int(height * scale), int(width * scale))
            # The processors round to 8 bits after resizing, which also clamps what bicubic overshoots.
            pixels = F.interpolate(pixels, size, mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((pixels.shape[-2] - self.crop[0]) // 2, (pixels.shape[-1] - self.crop[1]) // 2)
        assert min(top, left) >= 0, "the crop is not larger than the shortest edge"
        pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (pixels - self.mean) / self.std
