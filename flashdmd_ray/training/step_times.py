"""Time, throughput and memory of each step as metrics, and traces of chosen steps."""

from __future__ import annotations

import time
from pathlib import Path

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.plan.forecast import gpus_of, operations_of
from flashdmd_ray.plan.hardware import gpu_named
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.runtime.call_times import CallTimes, Took
from flashdmd_ray.training.observer import Observer

MEASURED = ("time/", "speed/", "memory/", "pool/")
"""Prefixes of the metrics that differ from run to run; all others follow from configuration and seed."""
FOLDER = "profile"
"""Name of the traces' folder in the run folder."""
GIB = 2**30


class StepTimes(Observer):
    """Adds what the calls of a step took. Its own step lasts from the end of every `before_step` to the first `after_step`."""

    def __init__(self, config: Config, times: CallTimes, run: Path) -> None:
        """run: its folder."""
        self._config = config
        self._times = times
        self._folder = run / FOLDER
        self._started = time.monotonic()
        self._gpus = sum(gpus_of(config).values())
        step = step_of(config, models_of(config), repeats=1) if self._gpus else None
        self._operations, self._operations_before = (0.0, 0.0) if step is None else operations_of(config, step)

    def before_step(self, step: int) -> None:
        number = step + 1
        self._times.trace_to = self._folder / f"step-{number:06d}" if number in self._config.profile.steps else None
        self._times.take()  # what came between two steps: checkpoints, sample grids
        self._started = time.monotonic()

    def after_step(self, done: int, metrics: Metrics) -> None:
        seconds, took = time.monotonic() - self._started, self._times.take()
        self._times.trace_to = None
        metrics |= {f"time/{call}": spent for call, spent in took.seconds.items()}
        metrics |= {
            f"time/wait/{group}": max(0.0, seconds - busy)
            for group, busy in took.busy.items()
            if group in ("learner", "discriminator")
        }
        metrics |= {"time/data": took.data_s, "time/step": seconds}
        metrics |= {f"memory/{group}": size / GIB for group, size in took.memory.items()}
        if self._config.preference.distill:
            metrics["speed/images"] = self._config.batch / seconds
        if (utilisation := self._utilisation(done, seconds, took)) is not None:
            metrics["speed/mfu"] = utilisation

    def _utilisation(self, done: int, seconds: float, took: Took) -> float | None:
        """Planned operations over what the GPUs could do; None where either is not known."""
        peaks = {gpu.matmul for name in took.gpus if name and (gpu := gpu_named(name)) is not None}
        preference = self._config.preference
        early = preference.updates > 0 and done <= preference.start_step
        operations = self._operations_before if early else self._operations
        return operations / (seconds * self._gpus * peaks.pop()) if len(peaks) == 1 and operations else None
