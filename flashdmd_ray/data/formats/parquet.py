"""Parquet tables with a caption and an encoded image in each row: bytes, or the {bytes, path} of Hugging Face.

A row cannot be read alone, only the row group it is in. So a block is a row group, a few of which are shuffled together
and held in memory.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from flashdmd_ray.data.formats.base import CAPTIONS, IMAGES, Columns, choose, is_filled
from flashdmd_ray.data.formats.names import absent_shards
from flashdmd_ray.data.formats.row import Row, captioned
from flashdmd_ray.data.sample import MISSING_IMAGE, Bad, BadSample, Entry, Sample

GROUPS_SHUFFLED = 8
ROWS = 64
DAMAGED_GROUP = "damaged row group"


class Groups:
    """The row groups read last, as columns of encoded images. Not pickled with its owner: each process reads its own."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, list[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def columns(self, block: int, load: Callable[[int], list[Any]]) -> list[Any]:
        with self._lock:
            if block not in self._kept:
                self._kept[block] = load(block)
            self._kept.move_to_end(block)
            while (
                len(self._kept) > GROUPS_SHUFFLED + 2
            ):  # two more than are mixed: one group ends while the next begins
                self._kept.popitem(last=False)
            return self._kept[block]

    def __reduce__(self) -> tuple[type[Groups], tuple[()]]:
        return Groups, ()


@dataclass(frozen=True)
class RowGroups(ABC):
    """Row groups in the order of the tables. What their rows hold is for subclasses to say."""

    tables: tuple[Path, ...]
    groups: Groups = field(default_factory=Groups, compare=False, repr=False, kw_only=True)
    shuffle_blocks = GROUPS_SHUFFLED

    @abstractmethod
    def row(self, path: Path) -> Row:
        """Which columns of that table are read."""

    def files(self) -> Iterable[Path]:
        return self.tables

    def pieces(self) -> int:
        return len(self.blocks)

    def scan(self, piece: int) -> Iterator[Entry]:
        if not piece:
            yield from absent_shards(self.tables)
        path, group = self.blocks[piece]
        table, row, number = open_table(path), self.row(path), 0
        try:
            for batch in table.iter_batches(batch_size=ROWS, row_groups=[group], columns=row.names):
                for values in batch.to_pylist():
                    yield row.sample(f"{path.name} group {group} row {number}", values, piece, number, image_bytes)
                    number += 1
        except (ValueError, OSError):  # a page that cannot be unpacked; Arrow's errors are ValueErrors
            for lost in range(number, table.metadata.row_group(group).num_rows):
                yield Bad(f"{path.name} group {group} row {lost}", DAMAGED_GROUP)

    def encoded(self, sample: Sample) -> list[bytes]:
        """The images of one row. Raises BadSample."""
        try:
            columns = self.groups.columns(sample.block, self._load)
            return [image_bytes(column[sample.offset].as_py()) for column in columns]
        except (ValueError, OSError):
            raise BadSample(DAMAGED_GROUP) from None

    def _load(self, block: int) -> list[Any]:
        path, group = self.blocks[block]
        names = self.row(path).images
        found = open_table(path).read_row_group(group, columns=list(names))
        return [found.column(name) for name in names]

    @cached_property
    def blocks(self) -> list[tuple[Path, int]]:
        return [(path, group) for path in self.tables for group in range(open_table(path).num_row_groups)]


@dataclass(frozen=True)
class ParquetImages(RowGroups):
    columns: Columns
    kind = "parquet"

    def row(self, path: Path) -> Row:
        return captioned(self.columns, open_table(path).schema_arrow.names, path, table_head(path))

    def read(self, sample: Sample) -> bytes:
        (encoded,) = self.encoded(sample)
        return encoded


def table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file row 3", {column: value}) for each row of a table."""
    batches = open_table(path).iter_batches(batch_size=ROWS)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        yield f"{path.name} row {number}", row


def holds_images(path: Path) -> bool:
    """True for a table with a column of images, or of anything else in bytes."""
    import pyarrow.types as types

    return any(
        field.name in IMAGES
        or types.is_struct(field.type)
        or types.is_binary(field.type)
        or types.is_large_binary(field.type)
        for field in open_table(path).schema_arrow
    )


def open_table(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError when it is none, or several joined into one file."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({str(error)[:100]}); make or fetch it again") from None
    _refuse_joined(path, table.metadata)
    return table


def _refuse_joined(path: Path, metadata: Any) -> None:
    """Raises ValueError where another table ends inside the file: only the last one's footer would be read."""
    ends = [0]
    for group in range(metadata.num_row_groups):
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            ends.append(start + column.total_compressed_size)
    with path.open("rb") as file:
        file.seek(max(ends))
        if b"PAR1PAR1" in file.read():
            raise ValueError(f"{path} is several parquet files joined into one; keep them apart")


@lru_cache(maxsize=4096)
def table_head(path: Path) -> tuple[dict[str, Any], ...]:
    """The first rows of a table, without its images' bytes: which columns hold something."""
    table = open_table(path)
    names = [name for name in table.schema_arrow.names if name in (*CAPTIONS, *IMAGES)]
    if not names:
        return ()
    try:
        batch = next(table.iter_batches(batch_size=ROWS, columns=names), None)
    except (ValueError, OSError):  # a damaged page: found by scanning
        return ()
    rows = [] if batch is None else batch.to_pylist()
    return tuple(
        {name: True if name in IMAGES and value is not None else value for name, value in row.items()} for row in rows
    )


def caption_column(columns: Columns, path: Path) -> str:
    """The text column of a table of prompts. Raises ValueError naming the columns there are."""
    filled = {name for row in table_head(path) for name, value in row.items() if is_filled(value)}
    return choose(columns.caption, CAPTIONS, open_table(path).schema_arrow.names, "data.caption", path, filled)


def image_bytes(value: object) -> bytes:
    encoded = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(encoded, bytes):
        raise BadSample(MISSING_IMAGE if value is None or isinstance(value, Mapping) else "image column holds no bytes")
    return encoded
