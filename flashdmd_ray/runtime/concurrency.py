"""Threads in which the driver waits for workers.

They are daemons: a call that never returns must not keep a finished driver alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run `call` in a thread of its own."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # the waiting thread must learn of every way to end
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="flashdmd-call").start()
    return future


def run_parallel(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run all calls at once; returns the results in order. Raises the first error without waiting for the others."""
    futures = [in_thread(call) for call in calls]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in futures:
        if future in done and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
