"""Translation of Ray's errors into this project's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Never

from ray import exceptions

from flashdmd_ray.run.messages import typed_line
from flashdmd_ray.runtime.errors import Call, Closed, DeadlineExceeded, RoleFailed, TensorsLost, WorkerError, WorkerLost

_SURROUNDINGS = (RuntimeError, ConnectionError, TimeoutError, MemoryError)
_PROGRAM = (NotImplementedError, RecursionError)


def translate(
    error: Exception, call: Call, worker: str, deadline_s: float, last_lines: Callable[[], str] = lambda: ""
) -> Exception:
    """Return the error that the driver should see for `error`, which a call on `worker` raised.

    What the role raised about its input or its numbers comes back as it was raised there, with the remote traceback as
    a note. last_lines: reads the end of the worker's log, "" where that cannot be had.
    """
    failure = _translate(error, call, worker, deadline_s, last_lines)
    if isinstance(failure, WorkerError):
        failure.call = call
    return failure


def _translate(
    error: Exception, call: Call, worker: str, deadline_s: float, last_lines: Callable[[], str]
) -> Exception:
    if isinstance(error, exceptions.GetTimeoutError):
        return DeadlineExceeded(
            f"{call}: {worker} did not answer within {deadline_s:g} s. "
            "It hangs or is too slow: see its log, lower the batch, or raise the limit under deadlines"
        )
    cause = error.cause if isinstance(error, exceptions.RayTaskError) else error
    if isinstance(cause, TensorsLost):
        return TensorsLost(f"{call}: its tensors are gone with the machine or process that had them ({cause})")
    if isinstance(error, exceptions.RayTaskError):
        return _from_role(error, call, worker)
    lines = last_lines()
    log = f". Its log ends: {lines}" if lines else ""
    return WorkerLost(f"{call}: {worker} is gone ({_cause(error)}){log}")


def _cause(error: Exception) -> str:
    """The reason of a worker's end, as far as Ray knows it."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return "Ray ended it, because its machine ran out of memory: use fewer workers or a smaller batch"
    text = str(error)
    if isinstance(error, exceptions.NodeDiedError) or ("node" in text and "died" in text and "was on" in text):
        return "its machine left the cluster"
    return (
        f"its process ended: killed, crashed, or ended by the system for want of memory; Ray says: {_first_line(error)}"
    )


def _from_role(error: exceptions.RayTaskError, call: Call, worker: str) -> Exception:
    cause = error.cause
    remote = f"raised by {call} on {worker}:\n{error}"
    if not isinstance(cause, Exception) or (isinstance(cause, _SURROUNDINGS) and not isinstance(cause, _PROGRAM)):
        failed = RoleFailed(f"{call}: {worker} failed: {typed_line(cause)}. See its log")
        failed.add_note(remote)
        return failed
    cause.add_note(remote)
    return cause


def most_telling(errors: list[Exception]) -> Exception:
    """Return the error, of those of several ranks in one call, that caused the others.

    A rank whose partner is gone only reports a lost connection.
    """

    def importance(error: Exception) -> int:
        if not isinstance(error, WorkerError):
            return 0
        return [WorkerLost, RoleFailed, TensorsLost, DeadlineExceeded, Closed].index(type(error)) + 1

    return min(errors, key=importance)


def reraise(error: Exception) -> Never:
    """Raise without the chain of Ray's own errors, which says nothing more."""
    raise error from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor is dead because", "The actor died"))]
    return (telling or lines or [type(error).__name__])[0].rstrip(".")[:200]
