"""`metrics.jsonl`: what a run measured at each step, one JSON object per line. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from flashdmd_ray.run.files import write_atomically


class MetricsLog:
    """`metrics.jsonl`: append-only JSON lines `{"step": 3, "score/loss": 0.12, ...}`, each on disk when `write` returns.

    Records of steps after `after_step` (those a resumed run will compute again) and a line torn by a crash are dropped on opening.
    A value that is not finite is written as null: JSON has no NaN.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        _drop_later_steps(path, after_step)
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def rewind(self, after_step: int) -> None:
        """Drop the records of steps after `after_step`: they will be computed again."""
        self._file.close()
        _drop_later_steps(self._path, after_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": int(step)} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_later_steps(path: Path, after_step: int) -> None:
    if not path.is_file():
        return
    remaining = "".join(json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= after_step)
    if remaining != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, remaining)
