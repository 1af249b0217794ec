"""Lines of text files, rows of .jsonl and .csv files: every line is something, nothing is joined or cut."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flashdmd_ray.data.sample import LARGEST_CAPTION
from flashdmd_ray.run.json_text import unique_names

HEAD = 1000
"""Rows that tell what a file's columns are called."""
_LONGEST_FIELD = 16 * LARGEST_CAPTION
_DELIMITERS = (",", ";", "\t", "|")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, or of a UTF-16 file with a byte order mark. Bytes that are no UTF-8 become lone surrogates."""
    with _open_text(path, newline=None) as file:
        yield from file


@contextmanager
def _open_text(path: Path, newline: str | None) -> Iterator[TextIO]:
    """A text file; one called .gz is unpacked. Raises ValueError where that is cut short or damaged."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            file.seek(0)
            yield io.TextIOWrapper(file, encoding, "surrogateescape", newline)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); make or fetch it again") from None


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", value) for each line that is not blank; `Ellipsis` is the value of a line that is no JSON, or names a field twice.

    A comma at the end of a line is none of its value. A file that is one list as a whole gives ("file item 3", value) for each item.
    """
    listed = _whole_list(path)
    if listed is not None:
        yield from ((f"{path.name} item {number}", item) for number, item in enumerate(listed, 1))
        return
    for number, line in enumerate(text_lines(path), 1):
        if text := line.strip():
            try:
                yield f"{path.name} line {number}", json.loads(text.removesuffix(","), object_pairs_hook=unique_names)
            except (ValueError, RecursionError):
                yield f"{path.name} line {number}", ...


def _whole_list(path: Path) -> list[Any] | None:
    """The items of a file that is one JSON list, as `json.dump` writes it; None for any other."""
    first = next((line for line in text_lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        return None
    try:
        whole = json.loads("".join(text_lines(path)), object_pairs_hook=_unique_or_nothing)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, list) else None


def _unique_or_nothing(pairs: list[tuple[str, Any]]) -> Any:
    try:
        return unique_names(pairs)
    except ValueError:
        return ...


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", {column: text}) for each row; `Ellipsis` for one with more or fewer columns than the header, or an open quote."""
    with _open_text(path, newline="") as file:
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
                    if twice := sorted({name for name in header if name and header.count(name) > 1}):
                        raise ValueError(f"{path}: column {', '.join(twice)} comes twice; rename one of them")
                elif row:
                    yield (
                        f"{path.name} line {line}",
                        dict(zip(header, row, strict=True)) if len(row) == len(header) else ...,
                    )
        finally:
            csv.field_size_limit(before)
