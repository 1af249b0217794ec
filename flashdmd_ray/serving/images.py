"""Pixels into files."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

from flashdmd_ray.serving.messages import ImageFormat


def to_picture(pixels: Tensor) -> Image.Image:
    """pixels: uint8 (H, W, 3)."""
    return Image.fromarray(pixels.contiguous().numpy())


def encode_picture(picture: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """quality: 0 to 100, of webp and jpeg. The same picture gives the same bytes; nothing else is written into the file."""
    buffer = io.BytesIO()
    if image_format == "png":
        picture.save(buffer, "PNG", compress_level=6)
    elif image_format == "webp":
        picture.save(buffer, "WEBP", quality=quality, method=4)
    else:
        picture.save(buffer, "JPEG", quality=max(1, quality), subsampling=0)
    return buffer.getvalue()
