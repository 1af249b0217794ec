"""A job under the eyes of benchmarks/chaos.py: its output and its steps, with the time of each."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

NOTICED = re.compile(r"failed: |replayed|cannot be written|could not be written|another worker is tried|No space")
RECOVERED = re.compile(r"recovered from: .*detected in ([\d.]+) s, rebuilt in ([\d.]+) s, loaded in ([\d.]+) s")


class Watched:
    """A running job. Times are of time.monotonic().

    began: when it was started. step_times: when each record of metrics.jsonl was seen. rewinds: (time, steps that were dropped).
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, folder: Path) -> None:
        self.log, self.folder = log, folder
        self.lines: list[tuple[float, str]] = []
        self.step_times: list[float] = []
        self.rewinds: list[tuple[float, int]] = []
        self.step = self._read_step()
        self.began = time.monotonic()
        self._file = log.open("a")
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
        self.pid = self._process.pid
        for work in (self._read, self._follow):
            threading.Thread(target=work, daemon=True).start()

    @property
    def code(self) -> int | None:
        return self._process.poll()

    @property
    def has_ended(self) -> bool:
        return self.code is not None

    def wait_for_step(self, step: int, seconds: float) -> bool:
        """Return False when the job ended before."""
        end = time.monotonic() + seconds
        while self.step < step and not self.has_ended:
            if time.monotonic() > end:
                raise SystemExit(f"step {step} was not made within {seconds:g} s: {self.log}")
            time.sleep(0.02)
        return self.step >= step

    def wait_for_end(self, seconds: float) -> int:
        code = self._process.wait(seconds)
        time.sleep(0.5)
        self.close()
        return code

    def stepped_since(self, at: float) -> bool:
        """True once a step was made that began after `at`."""
        return self._next_step(at) is not None

    def _next_step(self, at: float) -> float | None:
        """When that was: the second record, or the first one after a rewind or a new start."""
        rewound = max((when for when, _ in self.rewinds if when > at), default=None)
        begun_before = self.began < at and rewound is None
        after = [when for when in self.step_times if when > (rewound or at)]
        return after[begun_before] if len(after) > begun_before else None

    def recovery_since(self, at: float) -> dict[str, Any]:
        """Seconds of detect, rebuild and load, until the next step, and the steps that were lost."""
        found: dict[str, Any] = {"lost": sum(lost for when, lost in self.rewinds if when > at)}
        if (stepped := self._next_step(at)) is not None:
            found["next_step"] = stepped - at
        for when, line in self.lines:
            if when > at and NOTICED.search(line):
                found.setdefault("detect", when - at)
            if when > at and (match := RECOVERED.search(line)):
                found |= {"rebuild": float(match[2]), "load": float(match[3])}
        return found

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append((time.monotonic(), line))
            if not self._file.closed:
                self._file.write(line)
                self._file.flush()

    def _follow(self) -> None:
        while not self.has_ended:
            now, step = time.monotonic(), self._read_step()
            if step < self.step:
                self.rewinds.append((now, self.step - step))
            self.step_times += [now] * (step - self.step)
            self.step = step
            time.sleep(0.05)

    def _read_step(self) -> int:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, IndexError, ValueError):
            return 0
