"""Admission to the queue of one process that answers HTTP: bounded in all, for teachers, and for one client among several."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flashdmd_ray.serving.errors import queue_full

ACTIVE_S = 30.0
"""Seconds after its last request in which a client still counts as one of those who share the queue."""


class Admission:
    """Places of requests in sampling or waiting."""

    def __init__(self, size: int, teacher_share: float, clock: Callable[[], float] = time.monotonic) -> None:
        """size: places in all. teacher_share: share of them that requests to teachers may have; at least one place."""
        self._size = size
        self._teacher_size = max(1, int(size * teacher_share))
        self._clock = clock
        self._inside: Counter[str] = Counter()
        self._teachers_inside = 0
        self._last_asked: dict[str, float] = {}

    @property
    def inside(self) -> int:
        """Number of places that are taken."""
        return self._inside.total()

    @contextmanager
    def place(self, client: str, teacher: bool) -> Iterator[None]:
        """Take a place while the block lasts. Raises ApiError (429) when there is none for this client or for teachers.

        Half of the places are for anybody. The others are for clients that have less than an equal share of all places, so that one
        client can fill the queue only while it is alone.
        """
        fair_share = self._size / self._count_active(client)
        crowded = self.inside >= self._size // 2 and self._inside[client] >= fair_share
        if self.inside >= self._size or crowded or (teacher and self._teachers_inside >= self._teacher_size):
            raise queue_full()
        self._inside[client] += 1
        self._teachers_inside += teacher
        try:
            yield
        finally:
            self._inside[client] -= 1
            self._inside += Counter()  # forgets clients that have none
            self._teachers_inside -= teacher

    def _count_active(self, client: str) -> int:
        now = self._clock()
        self._last_asked[client] = now
        self._last_asked = {
            name: asked for name, asked in self._last_asked.items() if now - asked < ACTIVE_S or self._inside[name]
        }
        return len(self._last_asked)
