"""The index of a data set: where each sample is, made once, kept in a cache folder, mapped into memory.

The cache file is named after what it was made from (names, sizes and times of all files, and the columns), so a changed
data set is indexed anew and an unchanged one opens at once. It is an Arrow file: every process of a machine reads the
same pages, and a large data set costs no memory of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flashdmd_ray.data.formats import TextFormat
from flashdmd_ray.data.order import Integers
from flashdmd_ray.data.sample import Bad, Sample, is_text
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.run.files import check_writable, new_file, user_cache, write_atomically

VERSION = 3

Scanned = tuple[list[Sample], Tally]
ScanAll = Callable[[TextFormat], Iterable[Scanned]]


@dataclass(frozen=True)
class Index:
    """Good samples in the order of their data set, those of a block together.

    tally: what scanning saw, bad samples included. content: digest of keys, captions and lengths; equal digests mean
    equal data. block_sizes: samples in each block, int64 (blocks,).
    """

    table: Any
    tally: Tally
    content: str
    block_sizes: Integers

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def captions(self, samples: Iterable[int]) -> tuple[str, ...]:
        column = self.table.column("caption")
        return tuple(column[i].as_py() for i in samples)

    def sample(self, number: int) -> Sample:
        return Sample(**{name: self.table.column(name)[number].as_py() for name in _NAMES})

    def sizes(self) -> Integers:
        """(width, height) of every image, int64 (N, 2)."""
        return np.stack([self.table.column(name).to_numpy() for name in ("width", "height")], axis=1).astype(np.int64)

    def caption_lengths(self) -> Integers:
        """Characters of every caption, int64 (N,)."""
        import pyarrow.compute

        return pyarrow.compute.utf8_length(self.table.column("caption")).to_numpy().astype(np.int64)


_NAMES = tuple(field.name for field in fields(Sample) if field.name != "remarks")


def scan_piece(format: TextFormat, piece: int) -> Scanned:
    """The good samples of one piece and the count of all. Runs anywhere: both sides are plain values."""
    good, tally = [], Tally()
    for entry in format.scan(piece):
        if isinstance(entry, Sample) and not is_text(entry.key):
            entry = Bad(entry.key, "name is not text")
        tally.add(entry)
        if isinstance(entry, Sample):
            good.append(entry)
    return good, tally


def scan_here(format: TextFormat) -> Iterator[Scanned]:
    """Every piece, one after the other."""
    return (scan_piece(format, piece) for piece in range(format.pieces()))


def open_index(format: TextFormat, cache: Path, scan_all: ScanAll = scan_here) -> Index:
    """The index of a data set, from the cache or made now. Bad samples are in its tally; the caller judges them.

    Raises ValueError when there is no good sample, or the cache folder cannot be written.
    """
    path = cache / f"{_identity(format)}.arrow"
    if not path.is_file():
        _write(path, scan_all(format))
    index = _read(path)
    if not len(index):
        raise ValueError(
            f"no usable sample in this {format.kind}: {index.tally.summary()}; the caption of a.png is read from a.txt beside it, "
            'or in a folder from a line {"file_name": "a.png", "text": "..."} of metadata.jsonl (all forms: docs/data.md)'
        )
    return index


def is_indexed(format: TextFormat, cache: Path) -> bool:
    """Return True if `open_index` would answer at once."""
    return (cache / f"{_identity(format)}.arrow").is_file()


def default_cache() -> Path:
    """Folder of the indexes unless the configuration says otherwise."""
    return user_cache("data")


def _identity(format: TextFormat) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, format.kind, repr(getattr(format, "columns", None))]).encode())
    for path in format.files():
        try:
            status = path.stat()
        except OSError:  # a dangling link: a bad sample, found by scanning
            digest.update(f"{os.fsencode(path)!r} absent\n".encode())
            continue
        digest.update(f"{os.fsencode(path.absolute())!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _write(path: Path, scanned: Iterable[Scanned]) -> None:
    """Piece after piece to a temporary file, which gets its name when it is whole. Two processes may do it at once."""
    import pyarrow as pa

    types = {"key": pa.large_string(), "caption": pa.large_string()}
    schema = pa.schema([(name, types.get(name, pa.int64())) for name in _NAMES])
    tally, digest = Tally(), hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except OSError as error:
        raise ValueError(
            f"data.cache: cannot write {path.parent} ({error.strerror}); set it to a folder you can write"
        ) from None
    with new_file(path) as unfinished:
        with unfinished.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for samples, seen in scanned:
                tally.merge(seen)
                for s in samples:
                    digest.update(f"{s.key}\0{s.caption}\0{s.length}\n".encode())
                if samples:
                    writer.write_batch(pa.RecordBatch.from_pylist([asdict(s) for s in samples], schema))
        facts = {"tally": tally.as_json(), "content": digest.hexdigest()[:32]}
        write_atomically(path.with_suffix(".json"), json.dumps(facts))


def _read(path: Path) -> Index:
    import pyarrow as pa

    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{path} is damaged ({type(error).__name__}); remove it, and it is made anew") from None
    blocks = table.column("block").to_numpy()
    sizes: Integers = np.bincount(blocks) if len(blocks) else np.zeros(0, dtype=np.int64)
    return Index(table, Tally.from_json(facts["tally"]), facts["content"], sizes)
