"""Recovery: a fault of a group that holds trained state ends the attempt; what was lost is built anew, all is loaded from a checkpoint."""

from __future__ import annotations

import functools
import itertools
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from flashdmd_ray.config import DeadlineConfig
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.runtime.errors import DeadlineExceeded, NoRoom, WorkerError, WorkerLost
from flashdmd_ray.runtime.protocol import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")

Attempt = Callable[[Runtime, Callable[[int], None]], T]
"""Loads the last complete checkpoint, reports its step to the second argument, and trains."""

LONGEST_PAUSE_S = 30.0
"""Before an attempt; the first follows at once, later ones after 1, 2, 4, ... seconds."""
LOOK_S = 2.0
"""Between two looks for room."""
CHANCE, RULE = 3, 2
"""Times in a row that a fault comes at one step before it is taken for no accident: one from outside, and one that is computed."""


@dataclass(frozen=True)
class Fault:
    """The end of one attempt. step: the one that was under way; None before the first. at: time.monotonic() when it was noticed."""

    error: Exception
    step: int | None
    at: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for faults that are taken for the same."""
        call = self.error.call if isinstance(self.error, WorkerError) else None
        return (type(self.error), self.step, *((call.role, call.method) if call else (str(self.error),)))

    @property
    def repeats(self) -> int:
        return CHANCE if isinstance(self.error, WorkerLost | DeadlineExceeded) else RULE


class Supervisor:
    """Attempts of one job.

    newest: step of the newest complete checkpoint: faults are counted anew when it has changed. is_stopping: somebody asked the job to end.
    """

    def __init__(
        self,
        limits: DeadlineConfig,
        newest: Callable[[], int] = lambda: 0,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._limits = limits
        self._newest = newest
        self._is_stopping = is_stopping
        self._checkpoint = newest()
        self._faults: list[Fault] = []

    def run(self, attempt: Attempt[T], build: Callable[[Runtime | None], Runtime]) -> T | None:
        """Build a runtime and run `attempt` in it, and again after a fault; None when a stop was asked for meanwhile.

        build: gets the runtime of the attempt before, of which it may use what lives on. WorkerErrors and FloatingPointErrors lead to
        another attempt, at most `deadlines.attempts` without a new checkpoint; other errors, about the configuration or a file, would come
        back, so they are raised at once. A fault that comes again and again at the same step is raised too. Everything is closed in the
        end, by Ctrl-C too.
        """
        runtime: Runtime | None = None
        try:
            while True:
                try:
                    built = self._build(functools.partial(build, runtime))
                    if built is None:
                        return None
                    runtime = built
                    return attempt(runtime, self._reporter())
                except (WorkerError, FloatingPointError) as error:
                    fault = Fault(error, None if runtime is None else runtime.step)
                    traceback.clear_frames(error.__traceback__)  # they hold the roles of a local runtime
                if runtime is not None:
                    runtime.end_attempt(self._newest())
                self._admit(fault)
                self._pause()
        finally:
            if runtime is not None:
                runtime.close()

    def _build(self, build: Callable[[], Runtime]) -> Runtime | None:
        """At the start a job without room is refused; after a fault a machine may come back within `deadlines.start_s`."""
        end = time.monotonic() + self._limits.start_s
        while not (self._faults and self._is_stopping()):
            try:
                return build()
            except NoRoom as error:
                if not self._faults:
                    raise
                if time.monotonic() > end:
                    raise WorkerLost(f"no room within {self._limits.start_s:g} s: {error}") from None
                log.warning("waiting for room: %s", one_line(error))
                time.sleep(LOOK_S)
        return None

    def _reporter(self) -> Callable[[int], None]:
        """Log the line of a recovery, when the state of its checkpoint is loaded."""
        built = time.monotonic()

        def loaded(step: int) -> None:
            if not self._faults:
                return
            fault = self._faults[-1]
            detect = fault.error.detect_s if isinstance(fault.error, WorkerError) else 0.0
            rebuild, load = built - fault.at, time.monotonic() - built
            again = "no step" if fault.step is None or fault.step < step else f"steps {step + 1} to {fault.step + 1}"
            log.warning(
                "recovered from: %s; %s made again; detected in %.1f s, rebuilt in %.1f s, loaded in %.1f s",
                *(one_line(fault.error), again, detect, rebuild, load),
            )

        return loaded

    def _admit(self, fault: Fault) -> None:
        """Raise the fault's error when another attempt makes no sense."""
        newest = self._newest()
        if newest != self._checkpoint:
            self._checkpoint, self._faults = newest, []
        self._faults.append(fault)
        same = sum(1 for _ in itertools.takewhile(lambda other: other.key == fault.key, reversed(self._faults)))
        if same >= fault.repeats and fault.step is not None:
            raise type(fault.error)(
                f"{fault.error} (the same fault {same} times in a row at the same step: no accident)"
            )
        if len(self._faults) >= self._limits.attempts:
            raise fault.error
        number = f"attempt {len(self._faults)} of {self._limits.attempts} since the last checkpoint"
        log.warning("%s failed: %s; building anew", number, one_line(fault.error))

    def _pause(self) -> None:
        failures = len(self._faults)
        end = time.monotonic() + (0.0 if failures < 2 else min(LONGEST_PAUSE_S, 2.0 ** (failures - 2)))
        while time.monotonic() < end and not self._is_stopping():
            time.sleep(0.1)
