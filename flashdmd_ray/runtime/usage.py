"""What a pool was asked for and what it did, as figures of a step and of this moment. No Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolState:
    """A pool as a person sees it now. size: workers it has or brings up; ready: those that take calls; busy: those in a call.

    low, high: what it may have; alike for a pool of fixed size. busy_share: of its ready workers' time, over the last step.
    """

    size: int
    ready: int
    busy: int
    waiting: int
    low: int
    high: int
    busy_share: float


class Usage:
    """Integrals over time of a pool's workers and calls. Not safe for threads: its pool holds a lock around every call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self.ready = self.busy = self.waiting = 0
        self._ready_s = self._busy_s = 0.0
        self._most_waiting = self._replayed = 0
        self.busy_share = 0.0

    def change(self, ready: int = 0, busy: int = 0, waiting: int = 0) -> None:
        """So many more, or fewer, from now on."""
        self._advance()
        self.ready, self.busy, self.waiting = self.ready + ready, self.busy + busy, self.waiting + waiting
        self._most_waiting = max(self._most_waiting, self.waiting)

    def replay(self, groups: int) -> None:
        """A call about so many prompt groups failed and is made again."""
        self._replayed += groups

    def take(self) -> dict[str, float]:
        """Figures since the last call of this method: share of the ready workers' time spent in calls, most calls that
        waited at once, workers that take calls now, and prompt groups whose call was made again."""
        self._advance()
        self.busy_share = self._busy_s / self._ready_s if self._ready_s else 0.0
        figures = {
            "busy": self.busy_share,
            "queue": float(self._most_waiting),
            "workers": float(self.ready),
            "replayed": float(self._replayed),
        }
        self._ready_s = self._busy_s = 0.0
        self._most_waiting, self._replayed = self.waiting, 0
        return figures

    def _advance(self) -> None:
        now = self._clock()
        self._ready_s += self.ready * (now - self._since)
        self._busy_s += self.busy * (now - self._since)
        self._since = now
