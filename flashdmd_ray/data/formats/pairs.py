"""Labelled pairs of images in Pick-a-Pic's columns: caption, jpg_0, jpg_1, label_0, label_1; parquet tables or Hugging Face datasets.

A label is 1 for the better image and 0 for the other, 0.5 for both in a tie. A `Sample` is one pair, with the size of its first image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from flashdmd_ray.data.formats.hub import PREFIX, HubRows
from flashdmd_ray.data.formats.names import files_below
from flashdmd_ray.data.formats.parquet import RowGroups, open_table
from flashdmd_ray.data.formats.row import Row
from flashdmd_ray.data.sample import Entry, Sample

CAPTION, IMAGES, LABELS = "caption", ("jpg_0", "jpg_1"), ("label_0", "label_1")
PAIR = Row(CAPTION, IMAGES, LABELS)
TRUTH = "given_0"
"""label_0 as it was before rewards judged; only in tables that were written here."""

Pair = tuple[bytes, bytes]


class PairFormat(Protocol):
    """Labelled pairs in files. An instance holds paths only: it is pickled to other processes."""

    @property
    def kind(self) -> str: ...

    @property
    def shuffle_blocks(self) -> int | None:
        """As `ImageFormat.shuffle_blocks`."""

    def files(self) -> Iterable[Path]: ...

    def pieces(self) -> int: ...

    def scan(self, piece: int) -> Iterator[Entry]: ...

    def read(self, sample: Sample) -> Pair:
        """Both encoded images. Raises BadSample when they cannot be had any more."""

    def labels(self, sample: Sample) -> tuple[float, float]:
        """Preference for the first image, 0 to 1: by the label, and by the label before rewards judged (the same without one)."""


def open_pairs(source: str) -> PairFormat:
    """The format of pairs at `source`; reads no pair. Raises ValueError, one line, when there is none or a column is missing."""
    if source.startswith(PREFIX):
        return HubPairs(source)
    path = Path(source)
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return HubPairs(str(path))
    tables = (path,) if path.suffix == ".parquet" and path.is_file() else files_below(path, (".parquet",))
    if not tables:
        raise ValueError(
            f"pairs.source: {source} is no .parquet file, no folder of them, no folder of save_to_disk; hf:owner/name names a dataset"
        )
    for table in tables:
        _check_columns(open_table(table).schema_arrow.names, table)
    return ParquetPairs(tables)


def _check_columns(present: Sequence[str], where: object) -> None:
    missing = [name for name in PAIR.names if name not in present]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; labelled pairs have {', '.join(PAIR.names)}, this has {', '.join(present) or 'none'}"
        )


class ParquetPairs(RowGroups):
    kind = "parquet pairs"

    def row(self, path: Path) -> Row:
        return PAIR

    def read(self, sample: Sample) -> Pair:
        first, second = self.encoded(sample)
        return first, second

    def labels(self, sample: Sample) -> tuple[float, float]:
        labels, truth = _labels_of(*self.blocks[sample.block])
        return labels[sample.offset], truth[sample.offset]


@lru_cache(maxsize=4096)
def _labels_of(path: Path, group: int) -> tuple[list[float], list[float]]:
    table = open_table(path)
    names = [LABELS[0], *([TRUTH] if TRUTH in table.schema_arrow.names else [])]
    found = table.read_row_group(group, columns=names)
    return found.column(names[0]).to_pylist(), found.column(names[-1]).to_pylist()


class HubPairs(HubRows):
    kind = "hugging face pairs"

    def row(self, present: Sequence[str], head: Sequence[Mapping[str, Any]]) -> Row:
        _check_columns(present, self.source)
        return PAIR

    def read(self, sample: Sample) -> Pair:
        first, second = self.encoded(sample)
        return first, second

    def labels(self, sample: Sample) -> tuple[float, float]:
        label = float(self.rows[sample.offset][LABELS[0]])
        return label, label
