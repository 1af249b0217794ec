"""Crash-only recovery: a lost worker that holds trained state ends everything; all is built anew from the last checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from flashdmd_ray.runtime.errors import WorkerError
from flashdmd_ray.runtime.protocol import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")


def run_supervised(attempt: Callable[[Runtime], T], build: Callable[[], Runtime], max_attempts: int) -> T:
    """Build a runtime and run `attempt` in it, at most `max_attempts` times.

    `attempt` must resume from the last complete checkpoint by itself. Only WorkerErrors lead to another attempt;
    errors about the configuration or the numbers (ValueError, FloatingPointError) would come back, so they are raised
    at once. The runtime is closed in every case, by Ctrl-C too.
    """
    for number in range(1, max_attempts + 1):
        try:
            return _run_once(attempt, build)
        except WorkerError as error:
            if number == max_attempts:
                raise
            log.warning("attempt %d of %d failed: %s", number, max_attempts, error)
            log.warning("building all workers anew and resuming from the last complete checkpoint")
    raise ValueError(f"deadlines.attempts: must be at least 1, got {max_attempts}")


def _run_once(attempt: Callable[[Runtime], T], build: Callable[[], Runtime]) -> T:
    runtime = build()
    try:
        return attempt(runtime)
    finally:
        runtime.close()
