"""`metrics.jsonl`: what a run measured at each step, one JSON object per line. Imports no torch."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from flashdmd_ray.run.files import write_atomically

log = logging.getLogger(__name__)


class MetricsLog:
    """`metrics.jsonl`: append-only JSON lines `{"step": 3, "score/loss": 0.12, ...}`, each in the file when `write` returns.

    Records that find no room wait in memory until there is, which is said. Records of steps after `after_step` (those a resumed run will
    compute again) and a line torn by a crash are dropped on opening. A value that is not finite is written as null: JSON has no NaN.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        self._path = path
        self._waiting: list[tuple[int, bytes]] = []
        self._open(after_step)

    def rewind(self, after_step: int) -> None:
        """Drop the records of steps after `after_step`: they will be computed again."""
        self._waiting = [(step, line) for step, line in self._waiting if step <= after_step]
        self._file.close()
        self._open(after_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": int(step)} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._waiting.append((step, json.dumps(record).encode() + b"\n"))
        self._write()

    def close(self) -> None:
        self._write()
        self._file.close()

    def _open(self, after_step: int) -> None:
        _drop_later_steps(self._path, after_step)
        self._file: IO[bytes] = self._path.open("ab", buffering=0)

    def _write(self) -> None:
        while self._waiting:
            end, (_, line) = self._file.seek(0, os.SEEK_END), self._waiting[0]
            try:
                if self._file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._file.truncate(end)
                if len(self._waiting) == 1:
                    log.warning("%s cannot be written (%s): its records wait in memory", self._path, error.strerror)
                return
            self._waiting.pop(0)


class MetricsTail:
    """Complete lines that were appended to a file since the last look; all of them again when the file was replaced (on a resume)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._file_id = 0

    def new_records(self) -> list[tuple[int, dict[str, Any]]]:
        """(time of reading in ms, record) of each new line; a line that is no record is left out."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file_id = os.fstat(file.fileno()).st_ino
            if file_id != self._file_id:
                self._file_id, self._offset = file_id, 0
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]
        self._offset += sum(len(line) + 1 for line in lines)
        return [(int(time.time() * 1000), record) for line in lines if (record := _record(line)) is not None]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: str | bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _drop_later_steps(path: Path, after_step: int) -> None:
    if not path.is_file():
        return
    remaining = "".join(json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= after_step)
    if remaining != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, remaining)
