"""Prompts without images: .txt (one per line), .jsonl, or a text column of .parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from flashdmd_ray.data.formats.base import Columns, choose_caption
from flashdmd_ray.data.formats.lines import HEAD, json_rows, text_lines
from flashdmd_ray.data.formats.parquet import caption_column, open_table
from flashdmd_ray.data.sample import BROKEN_LINE, Bad, BadSample, Entry, Ignored, Sample, read_caption


@dataclass(frozen=True)
class TextPrompts:
    """One prompt on each line of a UTF-8 or UTF-16 file; blank lines are no prompts."""

    path: Path
    kind = "text prompts"

    def files(self) -> Iterable[Path]:
        return [self.path]

    def pieces(self) -> int:
        return 1

    def scan(self, piece: int) -> Iterator[Entry]:
        for number, line in enumerate(text_lines(self.path), 1):
            name = f"{self.path.name} line {number}"
            if line.strip():
                remarks = (
                    ("prompt that begins with '#'; a .txt file has no comments",)
                    if line.lstrip().startswith("#")
                    else ()
                )
                yield _prompt(name, line, remarks)
            else:
                yield Ignored(name, "blank line")


@dataclass(frozen=True)
class JsonPrompts:
    """One JSON object on each line; the prompt is one of its fields."""

    path: Path
    columns: Columns
    kind = "jsonl prompts"

    def files(self) -> Iterable[Path]:
        return [self.path]

    def pieces(self) -> int:
        return 1

    def scan(self, piece: int) -> Iterator[Entry]:
        head = [row for _, row in islice(json_rows(self.path), HEAD) if isinstance(row, dict)]
        column = choose_caption(self.columns, head, self.path) if any(head) else ""
        for name, row in json_rows(self.path):
            if isinstance(row, str):
                yield _prompt(name, row)
            elif isinstance(row, dict):
                yield _prompt(name, row.get(column))
            else:
                yield Bad(name, BROKEN_LINE)


@dataclass(frozen=True)
class ParquetPrompts:
    """A text column of parquet files."""

    tables: tuple[Path, ...]
    columns: Columns
    kind = "parquet prompts"

    def files(self) -> Iterable[Path]:
        return self.tables

    def pieces(self) -> int:
        return len(self.tables)

    def scan(self, piece: int) -> Iterator[Entry]:
        path = self.tables[piece]
        table = open_table(path)
        column, number = caption_column(self.columns, path), 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _prompt(f"{path.name} row {number}", value)
                number += 1


def _prompt(name: str, value: object, remarks: tuple[str, ...] = ()) -> Sample | Bad:
    try:
        text, more = read_caption(value, optional=False)
        return Sample(name, text, remarks=(*remarks, *more))
    except BadSample as bad:
        return Bad(name, bad.reason)
