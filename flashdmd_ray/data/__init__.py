"""Prompts and real images. A position in the data is a number, so resuming needs no state: see docs/data.md."""

from flashdmd_ray.data.build import build_images, open_reals
from flashdmd_ray.data.image_source import ImageSource, RealLatents, Reals

__all__ = ["ImageSource", "RealLatents", "Reals", "build_images", "open_reals"]
