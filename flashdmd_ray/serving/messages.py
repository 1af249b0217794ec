"""Messages between the HTTP front and the replicas: plain data, no tensors. Imports neither torch nor Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["png", "webp", "jpeg"]
Size = tuple[int, int]
"""(height, width) in pixels."""
SEEDS = 2**63
"""Number of seeds: 0 to SEEDS - 1."""


@dataclass(frozen=True)
class ImageJob:
    """One checked request: images of one prompt, one for each seed.

    client: name of who asks, for fair turns. timeout_s: seconds after which nobody waits for the result.
    """

    client: str
    model: str
    prompt: str
    seeds: tuple[int, ...]
    steps: int
    size: Size
    image_format: ImageFormat
    quality: int
    timeout_s: float


@dataclass(frozen=True)
class ImageResult:
    """Encoded images in the order of the job's seeds, and what made them.

    queue_s: seconds before the first forward. sampling_s: seconds from there to the pixels.
    """

    images: tuple[bytes, ...]
    version: str
    queue_s: float
    sampling_s: float
    batch: int
    """Images in the largest forward that this job took part in."""


@dataclass(frozen=True)
class Rejection:
    """Reason why there are no images, as an HTTP status and the fields of an OpenAI error."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A model as clients see it. sizes: the trained one first. steps: allowed numbers of denoising steps, the default first."""

    name: str
    version: str
    created: int
    """Unix time at which this version was loaded."""
    kind: Literal["student", "teacher"]
    base: str
    steps: tuple[int, ...]
    sizes: tuple[Size, ...]
    guidance_scale: float | None
    """None: the model takes no guidance."""
    cost_per_step: float
    """Forwards of one step of an image, as a share of those of a student's image in its trained number of steps."""
    aliases: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    """Prompts of the kind that it was trained for."""
    refused: str | None = None
    """Reason why a newer version of its source is not served; None when there is no such version."""


def size_text(size: Sequence[int]) -> str:
    """Write (height, width) as OpenAI does: 'WIDTHxHEIGHT'."""
    return f"{size[1]}x{size[0]}"


def parse_size(text: str) -> Size | None:
    """Read (height, width) from 'WIDTHxHEIGHT'; None when it is something else."""
    width, separator, height = text.partition("x")
    if not separator or not all(part.isascii() and part.isdigit() and len(part) <= 5 for part in (width, height)):
        return None
    return int(height), int(width)
