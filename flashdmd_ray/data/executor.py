"""Work on a data set that can be cut into items: indexing, checking, precomputing.

An item's work is done by a callable that is made once per process (it opens files or loads a network). `in_threads`
does the items here; `runtime.data_stream.on_ray` does the same on a cluster.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

MakeWorker = Callable[[], Callable[[Any], Any]]


class Executor(Protocol):
    """Somewhere to do the work."""

    def __call__(self, make_worker: MakeWorker, items: Sequence[Any], workers: int) -> Iterator[Any]:
        """The result of every item, in order, a few ahead of what is taken. make_worker and items are pickled."""


def in_threads(make_worker: MakeWorker, items: Sequence[Any], workers: int) -> Iterator[Any]:
    """In threads of this process that share one callable."""
    do = make_worker()
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(do, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def ranges(count: int, size: int) -> list[tuple[int, int]]:
    """0..count-1 cut into (start, stop) of at most `size`."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


class BatchWorker:
    """One item of a batch to one result, in a worker process of Ray Data. Both travel as bytes."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._do = make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._do(pickle.loads(item))) for item in batch["item"]]}
