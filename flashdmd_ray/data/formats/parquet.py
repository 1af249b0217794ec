"""Parquet tables with a caption and an encoded image in each row: bytes, or the {bytes, path} of Hugging Face.

A row cannot be read alone, only the row group it is in. So a block is a row group, a few of which are shuffled together
and held in memory.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flashdmd_ray.data.formats.base import CAPTIONS, IMAGES, Columns, choose
from flashdmd_ray.data.pixels import image_size
from flashdmd_ray.data.samples import MISSING_IMAGE, Bad, BadSample, Sample, check_caption

GROUPS_MIXED = 8
ROWS = 64
DAMAGED_GROUP = "damaged row group"


class Groups:
    """The row groups read last, as columns of encoded images. Not pickled with its owner: each process reads its own."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, block: int, load: Any) -> Any:
        with self._lock:
            if block not in self._kept:
                self._kept[block] = load(block)
            self._kept.move_to_end(block)
            while len(self._kept) > GROUPS_MIXED + 2:  # two more than are mixed: one group ends while the next begins
                self._kept.popitem(last=False)
            return self._kept[block]

    def __reduce__(self) -> tuple[type[Groups], tuple[()]]:
        return Groups, ()


@dataclass(frozen=True)
class ParquetImages:
    """Row groups in the order of the tables."""

    tables: tuple[Path, ...]
    columns: Columns
    groups: Groups = field(default_factory=Groups, compare=False, repr=False)
    kind = "parquet"
    mix = GROUPS_MIXED

    def files(self) -> Iterable[Path]:
        return self.tables

    def pieces(self) -> int:
        return len(self._blocks)

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        path, group = self._blocks[piece]
        table = open_table(path)
        caption, image = self._names(path)
        row = 0
        try:
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=[caption, image]):
                for value, encoded in zip(batch.column(caption), batch.column(image), strict=True):
                    yield _sample(f"{path.name} group {group} row {row}", value.as_py(), encoded.as_py(), piece, row)
                    row += 1
        except (ValueError, OSError):  # a page that cannot be unpacked; Arrow's errors are ValueErrors
            for lost in range(row, table.metadata.row_group(group).num_rows):
                yield Bad(f"{path.name} group {group} row {lost}", DAMAGED_GROUP)

    def read(self, sample: Sample) -> bytes:
        try:
            value = self.groups.column(sample.block, self._load)[sample.offset].as_py()
        except (ValueError, OSError):
            raise BadSample(DAMAGED_GROUP) from None
        return image_bytes(value)

    def _load(self, block: int) -> Any:
        path, group = self._blocks[block]
        return open_table(path).read_row_group(group, columns=[self._names(path)[1]]).column(0)

    def _names(self, path: Path) -> tuple[str, str]:
        present = open_table(path).schema_arrow.names
        return (
            choose(self.columns.caption, CAPTIONS, present, "data.caption", path),
            choose(self.columns.image, IMAGES, present, "data.image", path),
        )

    @cached_property
    def _blocks(self) -> list[tuple[Path, int]]:
        return [(path, group) for path in self.tables for group in range(open_table(path).num_row_groups)]


def open_table(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError when it is none."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error)[:100]}); make or fetch it again") from None


def _sample(name: str, caption: object, image: object, block: int, row: int) -> Sample | Bad:
    try:
        text = check_caption(caption)
        encoded = image_bytes(image)
        width, height = image_size(io.BytesIO(encoded), len(encoded))
    except BadSample as bad:
        return Bad(name, bad.reason)
    return Sample(name, text, block, row, len(encoded), width, height)


def image_bytes(value: object) -> bytes:
    encoded = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(encoded, bytes):
        raise BadSample(MISSING_IMAGE)  # none, or a path to somewhere else
    return encoded
