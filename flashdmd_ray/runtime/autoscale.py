"""Size of a growing pool, from how many calls ran or waited lately. No Ray, no clock of its own."""

from __future__ import annotations

from collections import deque

GROW_AFTER_S = 0.5
"""A queue that lasts so long makes a pool grow. Calls of one step that merely follow each other do not."""


class Demand:
    """Calls of a pool over time: those that ran and those that waited for a worker."""

    def __init__(self, shrink_after_s: float) -> None:
        """shrink_after_s: how long a pool must have been larger than needed before it shrinks."""
        self._shrink_after_s = shrink_after_s
        self._history: deque[tuple[float, int]] = deque()

    def note(self, now: float, calls: int) -> None:
        """Record `calls`, running and waiting, at time `now` in seconds; times must not decrease."""
        self._history.append((now, calls))
        while len(self._history) > 1 and self._history[1][0] <= now - self._shrink_after_s:
            self._history.popleft()

    def target(self, size: int, low: int, high: int) -> int:
        """Number of workers that a pool of `size`, allowed `low` to `high`, should have now.

        It grows to what was needed all through the last GROW_AFTER_S, and shrinks to the most that was needed in the last
        `shrink_after_s`; before it knows that long a past it does not shrink.
        """
        size = min(max(size, low), high)
        if not self._history:
            return size
        now = self._history[-1][0]
        if now - self._history[0][0] >= GROW_AFTER_S:
            lasting = min(calls for then, calls in self._history if then >= now - GROW_AFTER_S)
            size = max(size, min(lasting, high))
        if now - self._history[0][0] >= self._shrink_after_s:
            size = min(size, max(low, max(calls for _, calls in self._history)))
        return size
