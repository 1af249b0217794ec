"""Prompts without images: .txt (one per line), .jsonl, or a text column of .parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashdmd_ray.data.formats.base import CAPTIONS, Columns, choose
from flashdmd_ray.data.sample import BROKEN_LINE, Bad, BadSample, Sample, check_caption


@dataclass(frozen=True)
class TextPrompts:
    """One prompt on each line of a UTF-8 file; empty lines are no prompts."""

    path: Path
    kind = "text prompts"

    def files(self) -> Iterable[Path]:
        return [self.path]

    def pieces(self) -> int:
        return 1

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield _prompt(f"{self.path.name} line {number}", text)


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

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        field: str | None = None
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                name = f"{self.path.name} line {number}"
                if not line.strip():
                    continue
                try:
                    tree = json.loads(line)
                except (ValueError, RecursionError):
                    tree = None
                if isinstance(tree, str):
                    yield _prompt(name, tree)
                    continue
                if not isinstance(tree, dict):
                    yield Bad(name, BROKEN_LINE)
                    continue
                if field is None:
                    field = choose(self.columns.caption, CAPTIONS, list(tree), "data.caption", self.path)
                yield _prompt(name, tree.get(field))


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

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        from flashdmd_ray.data.formats.parquet import open_table

        path = self.tables[piece]
        table = open_table(path)
        column = choose(self.columns.caption, CAPTIONS, table.schema_arrow.names, "data.caption", path)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _prompt(f"{path.name} row {number}", value)
                number += 1


def _prompt(name: str, value: object) -> Sample | Bad:
    try:
        return Sample(name, check_caption(value))
    except BadSample as bad:
        return Bad(name, bad.reason)
