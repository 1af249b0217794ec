"""Time and memory of every role call, and traces of chosen ones. No Ray."""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from flashdmd_ray.data.waiting import seconds_waited
from flashdmd_ray.run.files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spent:
    """Cost of one call in its process.

    seconds: until the result lay on the CPU; kernels that no result waits for count for the next call. data_s: of them, waiting for images.
    memory: bytes; on a GPU the most that tensors took in the call, on a CPU what the process holds after it. gpu: its name, "" on a CPU.
    trace: of torch's profiler, gzipped JSON; empty without one.
    """

    seconds: float
    data_s: float
    memory: int
    gpu: str
    trace: bytes = b""


@dataclass(frozen=True)
class Reply:
    """Result of a role call. spent: by each rank."""

    result: Any
    spent: tuple[Spent, ...]


def metered(call: Callable[[], Any], device: torch.device, traced: bool) -> Reply:
    """Make a call of a role whose networks are on `device`. traced: under torch's profiler."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    started, waited = time.perf_counter(), seconds_waited()
    if traced:
        with torch.profiler.profile() as profiler:
            result = call()
    else:
        result = call()
    seconds, data_s = time.perf_counter() - started, seconds_waited() - waited
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else psutil.Process().memory_info().rss
    gpu = torch.cuda.get_device_name(device) if on_gpu else ""
    return Reply(result, (Spent(seconds, data_s, memory, gpu, _exported(profiler) if traced else b""),))


def _exported(profiler: torch.profiler.profile) -> bytes:
    with tempfile.TemporaryDirectory(prefix="flashdmd-") as folder:
        path = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


@dataclass
class Took:
    """Sums over some calls. seconds: by "<role>/<method>", of the slowest rank. busy: seconds by worker group, of its ranks in step.
    memory: the most bytes by worker group. gpus: names of all of them."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    memory: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    data_s: float = 0.0
    gpus: set[str] = field(default_factory=set)


class CallTimes:
    """Collects what the calls of an attempt spend. Safe for threads."""

    def __init__(self) -> None:
        self.trace_to: Path | None = None
        """Folder for a trace of each call, one file for rank 0; None for no traces."""
        self._lock = threading.Lock()
        self._took = Took()

    def add(self, group: str, role: str, method: str, spent: Sequence[Spent], trace_to: Path | None) -> None:
        """Count a call. trace_to: as it was when the call began."""
        with self._lock:
            took, seconds = self._took, max(each.seconds for each in spent)
            took.seconds[f"{role}/{method}"] += seconds
            took.busy[group] += seconds
            took.memory[group] = max(took.memory[group], *(each.memory for each in spent))
            took.data_s += max(each.data_s for each in spent)
            took.gpus |= {each.gpu for each in spent}
            if trace_to is not None:
                _keep(spent[0].trace, trace_to, f"{role}.{method}".replace("/", "."))

    def take(self) -> Took:
        """Return the sums since the last call of this method."""
        with self._lock:
            took, self._took = self._took, Took()
        return took


def _keep(trace: bytes, folder: Path, name: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + sum(1 for _ in folder.glob(f"{name}-*.json.gz"))
        write_atomically(folder / f"{name}-{number}.json.gz", trace)
    except OSError as error:
        log.warning("profile.steps: a trace is left out: %s", error)
