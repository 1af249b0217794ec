"""Image pre-processing as differentiable tensor operations: the stock processors cut the gradient to the pixels.

The stock processors resize bytes and round to bytes again; here nothing is rounded. On smooth images that is a difference of at most one
byte in [0, 255] per pixel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processor configurations store them


class Preprocessing(nn.Module, ABC):
    """Bring images to the model's size, then normalise them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @abstractmethod
    def _fit(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) of the model's size, of `pixels` (B, 3, H, W) in [0, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Normalised pixels float32 (B, 3, h, w) of `images` float (B, 3, H, W) in [-1, 1]; values outside are clamped."""
        return (self._fit((images.float().clamp(-1, 1) + 1) / 2) - self.mean) / self.std

    def _resize(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if pixels.shape[-2:] == (height, width):
            return pixels
        # The processors round to 8 bits after resizing, which also clamps what bicubic overshoots.
        return F.interpolate(pixels, (height, width), mode=self.mode, antialias=True, align_corners=False).clamp(0, 1)


class ClipPreprocessing(Preprocessing):
    """Resize the shortest edge with antialiasing and crop the centre: as `CLIPImageProcessor` does."""

    def __init__(
        self,
        shortest_edge: int,
        crop: tuple[int, int],
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        mode: str = "bicubic",
    ) -> None:
        super().__init__(mean, std, mode)
        self.shortest_edge = shortest_edge
        self.crop = crop

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

    def _fit(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self.shortest_edge / min(height, width)
        pixels = self._resize(pixels, int(height * scale), int(width * scale))
        extra = (pixels.shape[-2] - self.crop[0], pixels.shape[-1] - self.crop[1])
        assert min(extra) >= 0, "the crop is not larger than the shortest edge"
        top, left = (self._margin(each) for each in extra)
        return pixels[..., top : top + self.crop[0], left : left + self.crop[1]]

    def _margin(self, extra: int) -> int:
        """Left or top offset of the crop, for `extra` surplus pixels."""
        return extra // 2


class TorchvisionPreprocessing(ClipPreprocessing):
    """Preprocessing like torchvision's Resize and CenterCrop, which round an odd margin to the even neighbour."""

    def _margin(self, extra: int) -> int:
        return round(extra / 2)


class LongestEdgePreprocessing(Preprocessing):
    """Resize the longest edge with antialiasing and pad to a square with black: HPSv2's, and open_clip's mode 'longest'."""

    def __init__(self, side: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> None:
        super().__init__(mean, std, "bicubic")
        self.side = side

    def _fit(self, pixels: Tensor) -> Tensor:
        scale = self.side / max(pixels.shape[-2:])
        height, width = (round(edge * scale) for edge in pixels.shape[-2:])
        pixels = self._resize(pixels, height, width)
        top, left = ((self.side - height) // 2, (self.side - width) // 2)
        return F.pad(pixels, (left, self.side - width - left, top, self.side - height - top))
