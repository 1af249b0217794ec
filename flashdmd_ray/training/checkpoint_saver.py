"""The driver's side of a checkpoint: ask every role for its parts, go on training, commit when all parts are written."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from flashdmd_ray.checkpoint.manifest import Part
from flashdmd_ray.checkpoint.parts import Destination, PartReport
from flashdmd_ray.checkpoint.store import CheckpointStore
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.errors import WorkerError

log = logging.getLogger(__name__)

FIRST_LOOK_S, LONGEST_LOOK_S = 0.02, 0.5
"""Pauses between two questions to the roles whether their parts are written: each doubles the last, up to the second number."""
RETRY_S = 10.0
"""Before a checkpoint that could not be written is tried again."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""


class CheckpointSaver:
    """Saves the given roles to a store, at most one checkpoint at a time.

    As a context manager it waits at the end for the checkpoint under way, after an error too, but not after a second Ctrl-C.
    roles: with `save(directory)` and `saved(directory)`. deadline_s: for one checkpoint to be written.
    """

    def __init__(self, store: CheckpointStore, roles: Sequence[Any], asynchronous: bool, deadline_s: float) -> None:
        self.store = store
        self.roles = roles
        self.asynchronous = asynchronous
        self.deadline_s = deadline_s
        self.newest = 0
        """Step of the last checkpoint that is complete."""
        self._under_way: tuple[int, Future[None]] | None = None

    def save(self, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Take every role's tensors as they are now; returns before they are written, when asynchronous.

        Waits for the checkpoint before. Raises CheckpointError when that one, or a synchronous one, could not be written.
        """
        self.wait()
        try:
            destination = Destination(self.store.begin(step), background=self.asynchronous)
        except Exception as error:  # drivers of stores raise exceptions of their own
            raise _failed(step, error) from error
        try:
            for role in self.roles:
                role.save(destination)
        except BaseException:
            self.store.abandon(destination.path)
            raise
        finish = functools.partial(self._finish, destination, step, state, metrics)
        self._under_way = step, in_thread(finish)
        if not self.asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise the CheckpointError of a checkpoint that has failed meanwhile; does not wait."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint under way is complete. Raises CheckpointError when it cannot be, or not in time."""
        if self._under_way is None:
            return
        (step, future), self._under_way = self._under_way, None
        try:
            future.result(self.deadline_s + 2 * LONGEST_LOOK_S)  # late parts are reported by the thread itself, by name
        except TimeoutError:
            raise _failed(step, f"no answer within {self.deadline_s:g} s: see deadlines.checkpoint_s") from None

    def _finish(
        self, destination: Destination, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        try:
            parts = self._written_parts(destination, step)
            self.store.commit(destination.path, step, parts, state, metrics)
        except Exception as error:
            self.store.abandon(destination.path)
            raise _failed(step, error) from error
        self.newest = step
        try:
            self.store.retire()
        except Exception as error:  # the next checkpoint tries again
            log.warning("checkpoint of step %d: an older one could not be removed: %s", step, error)

    def _written_parts(self, destination: Destination, step: int) -> list[Part]:
        end, pause = time.monotonic() + self.deadline_s, FIRST_LOOK_S
        while True:
            texts = [text for role in self.roles for text in role.saved(destination)]
            reports = {report.name: report for report in map(PartReport.from_text, texts)}
            for report in reports.values():
                if report.error is not None:
                    raise _failed(step, report.error)
            written = [report.part for report in reports.values() if report.part is not None]
            if len(written) == len(reports):
                return written
            if time.monotonic() > end:
                late = ", ".join(name for name, report in reports.items() if report.part is None)
                raise _failed(step, f"{late} not written within {self.deadline_s:g} s: see deadlines.checkpoint_s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_LOOK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            try:
                self.wait()
            except Exception as failure:  # the error that ended the run is the one to report
                log.warning("%s", failure)


class Retries:
    """When to try again after a checkpoint that could not be written, for `limit_s` seconds in all."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._newest = -1  # the last complete checkpoint when the first of these failures came, at `_since`
        self._since = 0.0
        self._due_at = math.inf

    def plan(self, error: CheckpointError | OSError, newest: int) -> None:
        """Note a failure; raises it when none has been completed since the first one for too long."""
        now = time.monotonic()
        if newest != self._newest:
            self._newest, self._since = newest, now
            log.warning("%s. It is tried again after the next steps, for %g s", error, self._limit_s)
        if now > self._since + self._limit_s:
            raise error
        self._due_at = now + RETRY_S

    @property
    def is_due(self) -> bool:
        """True once for each plan, when its time has come."""
        due = time.monotonic() > self._due_at
        if due:
            self._due_at = math.inf
        return due


def _failed(step: int, reason: object) -> Exception:
    """The error to raise for `reason`; a lost worker, which another attempt may mend, stays what it is."""
    if isinstance(reason, CheckpointError | WorkerError):
        return reason
    text = one_line(reason).rstrip(".")
    return CheckpointError(
        f"the checkpoint of step {step} could not be written ({text}); the ones before it are as they were. "
        "Make room, or set checkpoint.dir to another place"
    )
