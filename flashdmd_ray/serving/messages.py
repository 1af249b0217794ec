"""What crosses the border between ingress and generator: plain data, no tensors. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["png", "webp", "jpeg"]
SEEDS = 2**63
"""Seeds are 0 .. SEEDS-1."""


@dataclass(frozen=True)
class DrawOrder:
    """One request: images of one prompt, one for each seed. size: (height, width) in pixels. patience_s: after this nobody waits."""

    model: str
    prompt: str
    seeds: tuple[int, ...]
    steps: int
    size: tuple[int, int]
    image_format: ImageFormat
    quality: int
    patience_s: float


@dataclass(frozen=True)
class Drawn:
    """Encoded images in the order of the seeds, and what made them. Seconds: before the first forward, and from there to the end."""

    images: tuple[bytes, ...]
    version: str
    queue_s: float
    draw_s: float
    batch: int
    """Images in the largest forward that this request took part in."""


@dataclass(frozen=True)
class Refused:
    """Why nothing was drawn, as an HTTP status and the fields of an OpenAI error."""

    status: int
    message: str
    code: str
    param: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A model as clients see it. sizes: (height, width), the trained one first. steps: allowed numbers, the default first."""

    name: str
    version: str
    created: int
    """Unix time at which this version was loaded."""
    kind: Literal["student", "teacher"]
    base: str
    steps: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    guidance_scale: float | None
    """None: the model takes no guidance."""
    aliases: tuple[str, ...] = ()
    refused: str | None = None
    """Why a newer version of its source is not served; None when there is no such version."""


def size_text(size: Sequence[int]) -> str:
    """(height, width) as OpenAI writes it: 'WIDTHxHEIGHT'."""
    return f"{size[1]}x{size[0]}"


def parse_size(text: str) -> tuple[int, int] | None:
    """(height, width) of 'WIDTHxHEIGHT'; None when it is something else."""
    width, separator, height = text.partition("x")
    if not separator or not all(part.isascii() and part.isdigit() and len(part) <= 5 for part in (width, height)):
        return None
    return int(height), int(width)
