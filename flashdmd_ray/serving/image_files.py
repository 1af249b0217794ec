"""Encoding of pixels as PNG, WebP or JPEG."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

from flashdmd_ray.serving.messages import ImageFormat


def to_pil(pixels: Tensor) -> Image.Image:
    """Convert uint8 (H, W, 3) to an image."""
    return Image.fromarray(pixels.contiguous().numpy())


def encode_image(image: Image.Image, image_format: ImageFormat, quality: int) -> bytes:
    """Encode an image; `quality` (0 to 100) is of WebP and JPEG.

    The same image gives the same bytes: no time, name or prompt is written into the file.
    """
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=6)
    elif image_format == "webp":
        image.save(buffer, "WEBP", quality=quality, method=4)
    else:
        image.save(buffer, "JPEG", quality=max(1, quality), subsampling=0)
    return buffer.getvalue()
