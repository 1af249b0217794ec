"""Errors of worker processes. Each message names role, method and step, and the remedy.

Errors that a role raises about its input or its numbers (ValueError, FloatingPointError, ...) are not here: they reach
the driver as they are, in both runtimes. The errors below mean that a *process* failed; the supervisor may build the
job anew after them.
"""

from __future__ import annotations

from dataclasses import dataclass


class NoRoom(ValueError):
    """No cluster answers, or it has no room for the job. A mistake at the start; later a machine may come back."""


class WorkerError(RuntimeError):
    """A worker process failed. Building the job anew from the last checkpoint can help."""

    call: Call | None = None
    """The call that failed."""
    detect_s: float = 0.0
    """Seconds from the start of that call until the failure was noticed."""


class WorkerLost(WorkerError):
    """A worker process is gone: killed, out of memory, or its machine left."""


class TensorsLost(WorkerLost):
    """Tensors that a call was to read are gone with the machine or process that had them.

    No other worker can read them either, so the call is not replayed; the one that noticed is whole.
    """


class DeadlineExceeded(WorkerError):
    """A worker did not answer in time."""


class Closed(WorkerError):
    """No more calls: the attempt that they belong to is over, or the job's workers have been ended."""

    def __init__(self, reason: str = "the attempt that this call belongs to is over") -> None:
        super().__init__(reason)


class RoleFailed(WorkerError):
    """A role raised an error that can come from its surroundings: a lost connection between ranks, memory, a device."""


@dataclass(frozen=True)
class Call:
    """Role, method and step of a call, for messages."""

    role: str
    method: str
    step: int | None = None

    def __str__(self) -> str:
        where = "before the first step" if self.step is None else f"at step {self.step}"
        return f"{self.role}.{self.method} {where}"
