"""Hugging Face datasets: `hf:owner/name[:split]`, or a folder that `save_to_disk` wrote. Needs the extra `hub`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from flashdmd_ray.data.formats.base import CAPTIONS, Columns
from flashdmd_ray.data.formats.lines import HEAD
from flashdmd_ray.data.formats.row import Row, captioned
from flashdmd_ray.data.sample import LEAVES_FOLDER, MISSING_IMAGE, BadSample, Entry, Sample

PREFIX = "hf:"
PIECE = 1024
HUB_S = 10.0
"""Seconds that the hub may take to say that it knows a data set."""


@dataclass(frozen=True)
class HubRows(ABC):
    """Rows of one split; they lie in memory-mapped files, so any row can be read alone and all are one block."""

    source: str
    shuffle_blocks = None

    @abstractmethod
    def row(self, present: Sequence[str], head: Sequence[Mapping[str, Any]]) -> Row:
        """Which of the columns are read."""

    def files(self) -> Iterable[Path]:
        return sorted(Path(entry["filename"]) for entry in self.rows.cache_files)

    def pieces(self) -> int:
        return max(1, -(-len(self.rows) // PIECE))

    def scan(self, piece: int) -> Iterator[Entry]:
        for number in range(piece * PIECE, min((piece + 1) * PIECE, len(self.rows))):
            yield self._row.sample(f"row {number}", self.rows[number], 0, number, image_bytes)

    def encoded(self, sample: Sample) -> list[bytes]:
        """The images of one row. Raises BadSample."""
        found = self.rows[sample.offset]
        return [image_bytes(found[name]) for name in self._row.images]

    @cached_property
    def _row(self) -> Row:
        return self.row(self.rows.column_names, _head(self.rows))

    @cached_property
    def rows(self) -> Any:
        """The columns that are read, images undecoded."""
        rows = load_rows(self.source)
        row = self.row(rows.column_names, _head(rows))
        from datasets import Image

        for name in row.images:
            rows = rows.cast_column(name, Image(decode=False))
        return rows.select_columns(row.names)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # open files stay here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class HubImages(HubRows):
    columns: Columns
    kind = "hugging face dataset"

    def row(self, present: Sequence[str], head: Sequence[Mapping[str, Any]]) -> Row:
        return captioned(self.columns, present, self.source, head)

    def read(self, sample: Sample) -> bytes:
        (encoded,) = self.encoded(sample)
        return encoded


def load_rows(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data.source: {source} needs the library 'datasets'; install the extra: pip install 'flashdmd-ray[hub]'"
        ) from None
    datasets.disable_progress_bars()
    name, _, split = source.removeprefix(PREFIX).partition(":")
    remedy = "correct the name or the split (hf:owner/name:split)"
    try:
        if not source.startswith(PREFIX):
            found = datasets.load_from_disk(source)
        elif _hub_answers(name):
            found = datasets.load_dataset(name, split=split or "train")
        else:
            remedy = "the hub cannot be reached and the cache has no copy: check the network, or HF_ENDPOINT"
            with _offline():
                found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # offline, unknown, gated, another layout: all mean that it cannot be had
        raise ValueError(
            f"data.source: {source} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}); "
            f"{remedy}"
        ) from None
    if isinstance(found, dict):
        raise ValueError(f"data.source: {source} holds the splits {', '.join(found)}; name the folder of one of them")
    return found


def _hub_answers(name: str) -> bool:
    """Return True when the hub answers about a data set within HUB_S. The libraries themselves try for half a minute and longer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(name, timeout=HUB_S)
    except HfHubHTTPError:  # unknown, gated: an answer
        return True
    except Exception:
        return constants.HF_HUB_OFFLINE  # which the libraries see for themselves
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Only copies in the cache are looked at."""
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _head(rows: Any) -> list[Mapping[str, Any]]:
    """The first rows, without images: which columns hold something."""
    names = [name for name in rows.column_names if name in CAPTIONS]
    return list(rows.select_columns(names).select(range(min(len(rows), HEAD)))) if names else []


def image_bytes(value: Any) -> bytes:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(encoded, bytes):
        return encoded
    path = value.get("path") if isinstance(value, dict) else None
    if not path:
        raise BadSample(MISSING_IMAGE)
    real = Path(path).resolve()
    if not any(real.is_relative_to(folder) for folder in _downloads()):
        raise BadSample(LEAVES_FOLDER)
    try:
        return real.read_bytes()
    except OSError:
        raise BadSample(MISSING_IMAGE) from None


def _downloads() -> list[Path]:
    """Folder of the library's downloads; images that are not in the table itself must lie there."""
    from datasets import config
    from huggingface_hub import constants

    return [Path(folder).resolve() for folder in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
