"""Lines of text files, rows of .jsonl and .csv files: every line is something, nothing is joined or cut."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashdmd_ray.data.sample import LARGEST_CAPTION

HEAD = 1000
"""Rows that tell what a file's columns are called."""
_LONGEST_FIELD = 16 * LARGEST_CAPTION
_DELIMITERS = (",", ";", "\t")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, or of a UTF-16 file with a byte order mark. Bytes that are no UTF-8 become lone surrogates."""
    with path.open(newline=None, errors="surrogateescape", encoding=_encoding(path)) as file:
        yield from file


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", value) for each line that is not blank; `Ellipsis` is the value of a line that is no JSON."""
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            try:
                yield f"{path.name} line {number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"{path.name} line {number}", ...


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", {column: text}) for each row; `Ellipsis` for one with more or fewer columns than the header, or an open quote."""
    with path.open(newline="", errors="surrogateescape", encoding=_encoding(path)) as file:
        first = file.readline()
        delimiter = max(_DELIMITERS, key=first.count)
        file.seek(0)
        before = csv.field_size_limit(_LONGEST_FIELD)
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header: list[str] | None = None
            while True:
                line = rows.line_num + 1
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error:
                    yield f"{path.name} line {line}", ...
                    continue
                if header is None:
                    header = [name.strip() for name in row]
                elif row:
                    yield (
                        f"{path.name} line {line}",
                        dict(zip(header, row, strict=True)) if len(row) == len(header) else ...,
                    )
        finally:
            csv.field_size_limit(before)
