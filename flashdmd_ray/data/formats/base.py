"""What every format of data set can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashdmd_ray.data.sample import Bad, Sample

CAPTIONS = ("caption", "text", "prompt", "txt")
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")
"""Names that columns and JSON fields of captions and images usually have, the likeliest first."""


@dataclass(frozen=True)
class Columns:
    """What the caption and the image are called; None: the first usual name that is there."""

    caption: str | None = None
    image: str | None = None


class TextFormat(Protocol):
    """Captions in files. An instance holds paths only: it is pickled to other processes."""

    @property
    def kind(self) -> str:
        """What it is called."""

    def files(self) -> Iterable[Path]:
        """Every file that what is found depends on."""

    def pieces(self) -> int:
        """Into how many parts scanning can be cut."""

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        """The samples of one piece, in order; equal on every call."""


class ImageFormat(TextFormat, Protocol):
    """Captioned images in files."""

    @property
    def shuffle_blocks(self) -> int | None:
        """How many blocks are best shuffled together; None where any sample can be read alone."""

    def read(self, sample: Sample) -> bytes:
        """The encoded image. Raises BadSample when it cannot be had any more."""


def choose(wanted: str | None, usual: Sequence[str], present: Sequence[str], key: str, where: object) -> str:
    """The column to read. Raises ValueError naming the columns there are."""
    if wanted is None:
        found = next((name for name in usual if name in present), None)
    else:
        found = wanted if wanted in present else None
    if found is None:
        asked = repr(wanted) if wanted else f"any of {', '.join(usual)}"
        raise ValueError(f"{where}: no column {asked}; it has {', '.join(present) or 'none'}; set {key} to one of them")
    return found
