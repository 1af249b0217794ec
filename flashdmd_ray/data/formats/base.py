"""Interface of every data set format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flashdmd_ray.data.sample import Entry, Sample, first_text

CAPTIONS = ("caption", "text", "prompt", "txt")
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")
"""Names that columns and JSON fields of captions and images usually have, the likeliest first."""


@dataclass(frozen=True)
class Columns:
    """Names of the caption and the image; None: the first usual one.

    captionless: an image without a caption is good.
    """

    caption: str | None = None
    image: str | None = None
    captionless: bool = False


class TextFormat(Protocol):
    """Captions in files. An instance holds paths only: it is pickled to other processes."""

    @property
    def kind(self) -> str:
        """Name of the format."""

    def files(self) -> Iterable[Path]:
        """Every file that what is found depends on."""

    def pieces(self) -> int:
        """Into how many parts scanning can be cut."""

    def scan(self, piece: int) -> Iterator[Entry]:
        """The samples of one piece, in order; equal on every call."""


class ImageFormat(TextFormat, Protocol):
    """Captioned images in files."""

    @property
    def shuffle_blocks(self) -> int | None:
        """Number of blocks that are best shuffled together; None where any sample can be read alone."""

    def read(self, sample: Sample) -> bytes:
        """The encoded image. Raises BadSample when it cannot be had any more."""


def choose(
    wanted: str | None, usual: Sequence[str], present: Sequence[str], key: str, where: object, filled: Collection[str]
) -> str:
    """The column to read: the wanted one, else the first usual one that is filled, else one that is there.

    Raises ValueError naming the columns there are.
    """
    candidates = [name for name in ((wanted,) if wanted else usual) if name in present]
    if not candidates:
        asked = repr(wanted) if wanted else f"any of {', '.join(usual)}"
        raise ValueError(f"{where}: no column {asked}; it has {', '.join(present) or 'none'}; set {key} to one of them")
    return next((name for name in candidates if name in filled), candidates[0])


def choose_caption(columns: Columns, rows: Sequence[Mapping[str, object]], where: object) -> str:
    """The name of the caption in rows of JSON or CSV: see `choose`. Raises ValueError when no row has such a name."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    filled = {name for row in rows for name, value in row.items() if is_filled(value)}
    return choose(columns.caption, CAPTIONS, present, "data.caption", where, filled)


def is_filled(value: object) -> bool:
    """True for a text, or a list of texts, that says something."""
    value = first_text(value)
    return isinstance(value, str) and bool(value.strip())
