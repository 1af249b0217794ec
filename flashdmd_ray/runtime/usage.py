"""Counts of a pool's workers and calls, as figures of a step and of this moment. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolState:
    """A pool at this moment.

    size: workers it has or brings up; ready: those that take calls; busy: those in a call; waiting: calls without a worker.
    low, high: bounds of its size, equal for a pool of fixed size. busy_share: of its ready workers' time, over the last step.
    """

    size: int
    ready: int
    busy: int
    waiting: int
    low: int
    high: int
    busy_share: float


class Usage:
    """Counts of a pool's workers and calls, and their integrals over time. Not safe for threads: its owner locks around every call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self.ready = self.busy = self.waiting = 0
        self._ready_s = self._busy_s = 0.0
        self._max_waiting = self._replayed = 0
        self.busy_share = 0.0

    def adjust(self, ready: int = 0, busy: int = 0, waiting: int = 0) -> None:
        """Add these deltas to the live counts."""
        self._advance()
        self.ready, self.busy, self.waiting = self.ready + ready, self.busy + busy, self.waiting + waiting
        self._max_waiting = max(self._max_waiting, self.waiting)

    def count_replay(self, groups: int) -> None:
        """Count a failed call about so many prompt groups that is made again."""
        self._replayed += groups

    def take_figures(self) -> dict[str, float]:
        """Return the figures since the last call of this method.

        busy: share of the ready workers' time spent in calls. queue: most calls that waited at once. workers: those that take calls now.
        replayed: prompt groups whose call was made again.
        """
        self._advance()
        self.busy_share = self._busy_s / self._ready_s if self._ready_s else 0.0
        figures = {
            "busy": self.busy_share,
            "queue": float(self._max_waiting),
            "workers": float(self.ready),
            "replayed": float(self._replayed),
        }
        self._ready_s = self._busy_s = 0.0
        self._max_waiting, self._replayed = self.waiting, 0
        return figures

    def _advance(self) -> None:
        now = self._clock()
        self._ready_s += self.ready * (now - self._since)
        self._busy_s += self.busy * (now - self._since)
        self._since = now
