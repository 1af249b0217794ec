"""Labelled pairs of images in Pick-a-Pic's columns: caption, jpg_0, jpg_1, label_0, label_1; parquet tables or Hugging Face datasets.

A label is 1 for the better image and 0 for the other, 0.5 for both in a tie. A `Sample` is one pair, with the size of its first image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from flashdmd_ray.data.formats import hub
from flashdmd_ray.data.formats.parquet import DAMAGED_GROUP, GROUPS_MIXED, Groups, image_bytes, open_table
from flashdmd_ray.data.pixels import image_size
from flashdmd_ray.data.samples import Bad, BadSample, Sample, check_caption

CAPTION, IMAGES, LABELS = "caption", ("jpg_0", "jpg_1"), ("label_0", "label_1")
COLUMNS = (CAPTION, *IMAGES, *LABELS)
TRUTH = "given_0"
"""label_0 as it was before rewards judged; only in tables that were written here."""
NO_LABEL = "no label"
PIECE = 1024
ROWS = 32

Pair = tuple[bytes, bytes]


class PairFormat(Protocol):
    """Labelled pairs in files. An instance holds paths only: it is pickled to other processes."""

    @property
    def kind(self) -> str: ...

    @property
    def mix(self) -> int | None:
        """As `ImageFormat.mix`."""

    def files(self) -> Iterable[Path]: ...

    def pieces(self) -> int: ...

    def scan(self, piece: int) -> Iterator[Sample | Bad]: ...

    def read(self, sample: Sample) -> Pair:
        """Both encoded images. Raises BadSample when they cannot be had any more."""

    def labels(self, sample: Sample) -> tuple[float, float]:
        """How much the first image is preferred, 0 to 1: by the label, and by the label before rewards judged (the same without one)."""


def open_pairs(source: str) -> PairFormat:
    """The format of pairs at `source`; reads no pair. Raises ValueError, one line, when there is none or a column is missing."""
    if source.startswith(hub.PREFIX):
        return HubPairs(source)
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return HubPairs(str(path))
    tables = (path,) if path.suffix == ".parquet" and path.is_file() else tuple(sorted(path.rglob("*.parquet")))
    if not tables:
        raise ValueError(
            f"pairs.source: {source} is no .parquet file, no folder of them, no folder of save_to_disk; hf:owner/name names a dataset"
        )
    for table in tables:
        _check_columns(open_table(table).schema_arrow.names, table)
    return ParquetPairs(tables)


def _check_columns(present: Sequence[str], where: object) -> None:
    missing = [name for name in COLUMNS if name not in present]
    if missing:
        raise ValueError(
            f"{where}: no column {', '.join(missing)}; labelled pairs have {', '.join(COLUMNS)}, this has {', '.join(present) or 'none'}"
        )


@dataclass(frozen=True)
class ParquetPairs:
    """Row groups in the order of the tables."""

    tables: tuple[Path, ...]
    groups: Groups = field(default_factory=Groups, compare=False, repr=False)
    kind = "parquet pairs"
    mix = GROUPS_MIXED

    def files(self) -> Iterable[Path]:
        return self.tables

    def pieces(self) -> int:
        return len(self._blocks)

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        path, group = self._blocks[piece]
        table, row = open_table(path), 0
        try:
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=list(COLUMNS)):
                for values in batch.to_pylist():
                    yield _sample(f"{path.name} group {group} row {row}", values, piece, row, image_bytes)
                    row += 1
        except (ValueError, OSError):  # a page that cannot be unpacked; Arrow's errors are ValueErrors
            for lost in range(row, table.metadata.row_group(group).num_rows):
                yield Bad(f"{path.name} group {group} row {lost}", DAMAGED_GROUP)

    def read(self, sample: Sample) -> Pair:
        try:
            first, second = self.groups.column(sample.block, self._load)
            return image_bytes(first[sample.offset].as_py()), image_bytes(second[sample.offset].as_py())
        except (ValueError, OSError):
            raise BadSample(DAMAGED_GROUP) from None

    def labels(self, sample: Sample) -> tuple[float, float]:
        labels, truth = _labels_of(*self._blocks[sample.block])
        return labels[sample.offset], truth[sample.offset]

    def _load(self, block: int) -> Any:
        path, group = self._blocks[block]
        found = open_table(path).read_row_group(group, columns=list(IMAGES))
        return [found.column(name) for name in IMAGES]

    @cached_property
    def _blocks(self) -> list[tuple[Path, int]]:
        return [(path, group) for path in self.tables for group in range(open_table(path).num_row_groups)]


@lru_cache(maxsize=4096)
def _labels_of(path: Path, group: int) -> tuple[list[float], list[float]]:
    table = open_table(path)
    names = [LABELS[0], *([TRUTH] if TRUTH in table.schema_arrow.names else [])]
    found = table.read_row_group(group, columns=names)
    return found.column(names[0]).to_pylist(), found.column(names[-1]).to_pylist()


@dataclass(frozen=True)
class HubPairs:
    """Rows of one split, in memory-mapped files, so any row can be read alone and all are one block. Needs the extra `hub`."""

    source: str
    kind = "hugging face pairs"
    mix = None

    def files(self) -> Iterable[Path]:
        return sorted(Path(entry["filename"]) for entry in self._rows.cache_files)

    def pieces(self) -> int:
        return max(1, -(-len(self._rows) // PIECE))

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        for row in range(piece * PIECE, min((piece + 1) * PIECE, len(self._rows))):
            yield _sample(f"row {row}", self._rows[row], 0, row, hub.image_bytes)

    def read(self, sample: Sample) -> Pair:
        found = self._rows[sample.offset]
        return hub.image_bytes(found[IMAGES[0]]), hub.image_bytes(found[IMAGES[1]])

    def labels(self, sample: Sample) -> tuple[float, float]:
        label = float(self._rows[sample.offset][LABELS[0]])
        return label, label

    @cached_property
    def _rows(self) -> Any:
        """The dataset, its images undecoded."""
        rows = hub.load_rows(self.source)
        _check_columns(rows.column_names, self.source)
        from datasets import Image

        for name in IMAGES:
            if isinstance(rows.features[name], Image):
                rows = rows.cast_column(name, Image(decode=False))
        return rows.select_columns(list(COLUMNS))

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source}  # open files stay here

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _sample(
    name: str, values: Mapping[str, Any], block: int, row: int, encoded_in: Callable[[Any], bytes]
) -> Sample | Bad:
    try:
        caption = check_caption(values[CAPTION])
        check_labels([values[name] for name in LABELS])
        encoded = [encoded_in(values[name]) for name in IMAGES]
        sizes = [image_size(io.BytesIO(data), len(data)) for data in encoded]
    except BadSample as bad:
        return Bad(name, bad.reason)
    return Sample(name, caption, block, row, sum(map(len, encoded)), *sizes[0])


def check_labels(labels: Sequence[Any]) -> None:
    """Raises BadSample unless they are two shares of one: Pick-a-Pic has rows that nobody judged."""
    try:
        first, second = (float(label) for label in labels)
    except (TypeError, ValueError):
        raise BadSample(NO_LABEL) from None
    if not (0 <= first <= 1 and abs(first + second - 1) < 1e-6):
        raise BadSample(NO_LABEL)
