"""Hugging Face datasets: `hf:owner/name[:split]`, or a folder that `save_to_disk` wrote. Needs the extra `hub`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flashdmd_ray.data.formats.base import CAPTIONS, IMAGES, Columns, choose
from flashdmd_ray.data.pixels import image_size
from flashdmd_ray.data.samples import LEAVES_FOLDER, MISSING_IMAGE, Bad, BadSample, Sample, check_caption

PREFIX = "hf:"
PIECE = 1024


@dataclass(frozen=True)
class HubImages:
    """Rows of one split; they lie in memory-mapped files, so any row can be read alone and all are one block."""

    source: str
    columns: Columns
    kind = "hugging face dataset"
    mix = None

    def files(self) -> Iterable[Path]:
        return sorted(Path(entry["filename"]) for entry in self._rows.cache_files)

    def pieces(self) -> int:
        return max(1, -(-len(self._rows) // PIECE))

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        caption, image = self._names
        for row in range(piece * PIECE, min((piece + 1) * PIECE, len(self._rows))):
            found = self._rows[row]
            name = f"row {row}"
            try:
                text = check_caption(found[caption])
                encoded = image_bytes(found[image])
                width, height = image_size(io.BytesIO(encoded), len(encoded))
            except BadSample as bad:
                yield Bad(name, bad.reason)
                continue
            yield Sample(name, text, 0, row, len(encoded), width, height)

    def read(self, sample: Sample) -> bytes:
        return image_bytes(self._rows[sample.offset][self._names[1]])

    @cached_property
    def _names(self) -> tuple[str, str]:
        present = self._rows.column_names
        return (
            choose(self.columns.caption, CAPTIONS, present, "data.caption", self.source),
            choose(self.columns.image, IMAGES, present, "data.image", self.source),
        )

    @cached_property
    def _rows(self) -> Any:
        """The dataset, its image column undecoded."""
        rows = load_rows(self.source)
        present = rows.column_names
        column = choose(self.columns.image, IMAGES, present, "data.image", self.source)
        from datasets import Image

        return rows.cast_column(column, Image(decode=False))

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "columns": self.columns}  # open files stay here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def load_rows(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"data.source: {source} needs the library 'datasets'; install the extra: pip install 'flashdmd-ray[hub]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        if not source.startswith(PREFIX):
            found = datasets.load_from_disk(source)
        else:
            name, _, split = source.removeprefix(PREFIX).partition(":")
            found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # offline, unknown, gated, another layout: all mean that it cannot be had
        raise ValueError(
            f"data.source: {source} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}); "
            "correct the name or the split (hf:owner/name:split)"
        ) from None
    if isinstance(found, dict):
        raise ValueError(f"data.source: {source} holds the splits {', '.join(found)}; name the folder of one of them")
    return found


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
    """Where the library puts what it downloads; images that are not in the table itself must lie there."""
    from datasets import config
    from huggingface_hub import constants

    return [Path(folder).resolve() for folder in (config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)]
