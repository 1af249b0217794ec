"""Encoded image bytes, from anywhere, to pixels of a fixed size. Pillow and numpy only."""

from __future__ import annotations

import io
import warnings
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from flashdmd_ray.data.sample import BadSample

MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs, here for refusal instead of a warning."""
LARGEST_FILE = 256 * 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""What is opened, whatever a file is called. Formats that run other programs (EPS) or are rarely photographs stay out."""
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".apng",
    ".webp",
    ".avif",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
)

OTHER_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw")
"""Suffixes of image formats that are not read."""
_STAND_INS = (
    (b"version https://git", "Git LFS pointer instead of the image"),
    (b"<!doctype html", "web page instead of the image"),
    (b"<html", "web page instead of the image"),
)
_FOREIGN = {b"ftyphei": "HEIC", b"ftypmif1": "HEIC", b"JXL ": "JPEG XL", b"jP  ": "JPEG 2000"}
"""Start of a file's bytes 4 to 12 -> an image format that is not read."""
FURTHER_FRAME = "further frame of an animation, or page, which is not used"

LARGEST_METADATA = 64 * 2**20
"""Text and colour profiles of one PNG, unpacked: nobody needs them, and picture generators store whole workflows there."""
STRIP = 256
"""Rows that are converted to RGB at a time, so that a large image is not held in three forms."""

Pixels = NDArray[np.uint8]
_ROTATED = (5, 6, 7, 8)
_ORIENTATION = 0x0112

# The limit is checked below, for every image; Pillow would warn at the same number and refuse at twice as much.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = LARGEST_METADATA


class ImageFacts(NamedTuple):
    """Size of an image as it is looked at, in pixels, and remarks on it: one for each thing that is left out."""

    width: int
    height: int
    remarks: tuple[str, ...] = ()


def image_facts(file: IO[bytes], length: int) -> ImageFacts:
    """Read the header of an image. Raises BadSample."""
    image = _open(file, length)
    remarks = (FURTHER_FRAME,) * _further_frames(image)
    width, height = image.size
    try:
        rotated = image.getexif().get(_ORIENTATION) in _ROTATED
    except Exception:  # damaged EXIF is no reason to lose an image
        rotated = False
    return ImageFacts(height, width, remarks) if rotated else ImageFacts(width, height, remarks)


def _further_frames(image: Image.Image) -> int:
    """Frames of an animation, or pages, beyond the first; the previews and depth maps that phones add to a JPEG are none."""
    try:
        return 0 if image.format == "MPO" else getattr(image, "n_frames", 1) - 1
    except Exception:  # damage behind the first frame, which may be whole
        return 0


def decode(data: bytes, size: tuple[int, int]) -> Pixels:
    """RGB uint8 (H, W, 3): upright, cropped around the centre to the aspect ratio of `size` = (H, W), resized to it.

    Gray, palette, 16-bit and CMYK images become RGB; what is transparent becomes white. Raises BadSample.
    """
    image = _open(io.BytesIO(data), len(data))
    height, width = size
    try:
        _read_small(image, max(height, width))
        upright = _rgb(_upright(image))
        return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS))
    except BadSample:
        raise
    except Exception as error:  # libraries raise almost anything on damaged bytes
        raise BadSample(_reason(error, "truncated or damaged image")) from error


def _open(file: IO[bytes], length: int) -> Image.Image:
    if length == 0:
        raise BadSample("empty image file")
    if length > LARGEST_FILE:
        raise BadSample(f"image file above {LARGEST_FILE // 2**20} MiB")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadSample(f"image above {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # not only UnidentifiedImageError: parsers of headers raise almost anything
        raise BadSample(_reason(error, _content(file))) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"image above {MAX_PIXELS:,} pixels")
    if not image.width or not image.height:
        raise BadSample("not an image")
    return image


def _reason(error: Exception, otherwise: str) -> str:
    """Why an image cannot be read: its metadata is too large, or what else it is called."""
    large = "MAX_TEXT_CHUNK" in str(error) or "MAX_TEXT_MEMORY" in str(error)
    return f"image metadata above {LARGEST_METADATA // 2**20} MiB" if large else otherwise


def _content(file: IO[bytes]) -> str:
    """Name the content of a file that is no image that is read."""
    file.seek(0)
    start = file.read(64)
    text, brand = start.lstrip().lower(), start[4:12]
    foreign = next((name for mark, name in _FOREIGN.items() if brand.startswith(mark)), None)
    if foreign is not None:
        return f"{foreign} image, which is not read; convert it to JPEG, PNG or WebP"
    return next((what for mark, what in _STAND_INS if text.startswith(mark)), "not an image")


def _read_small(image: Image.Image, side: int) -> None:
    """Let JPEG decode at a half, quarter or eighth of the size, as long as twice the pixels wanted are left."""
    wanted = 2 * side
    if image.format == "JPEG" and min(image.size) > wanted:
        image.draft(None, (wanted, wanted))
    image.load()


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # damaged EXIF: as stored
        return image
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, converted in strips of rows: 89 million pixels are 268 MB once."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP):
        rows = image.crop((0, top, image.width, min(top + STRIP, image.height)))
        result.paste(_strip_rgb(rows), (0, top))
    return result


def _strip_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadSample("more than 16 bits per channel")
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise BadSample("more than 16 bits per channel")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
