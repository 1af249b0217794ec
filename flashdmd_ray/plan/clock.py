"""Virtual time: who works when, if every call of a step takes as long as its operations, kernels and bytes say."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Past:
    """Chain of calls that led to a moment: the last call and its own past."""

    call: str
    seconds: float
    before: Past | None


@dataclass
class Moment:
    """A time in seconds, and the chain of calls that had to end first."""

    time: float = 0.0
    past: Past | None = None


class Clock:
    """The driver's own time, and when each worker of each group is free again."""

    def __init__(self) -> None:
        self.now = Moment()
        self.busy: dict[str, float] = defaultdict(float)
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._free: dict[str, list[Moment]] = {}

    def start(self) -> None:
        """Begin anew, with everybody free."""
        self.now, self._free = Moment(), {}
        self.busy.clear()
        self.seconds.clear()

    def work(self, group: str, workers: int, call: str, seconds: float) -> None:
        """One worker of the group, the first that is free, makes a call that the driver waits for. workers: 1 for ranks in step."""
        free = self._free.setdefault(group, [Moment() for _ in range(workers)])
        worker = min(range(workers), key=lambda index: free[index].time)
        begun = max(self.now, free[worker], key=lambda moment: moment.time)
        ended = Moment(begun.time + seconds, Past(f"{group}: {call}", seconds, begun.past))
        free[worker] = self.now = ended
        self.busy[group] += seconds / workers
        self.seconds[group, call].append(seconds)

    def spend(self, call: str, seconds: float) -> None:
        """The driver itself takes so long."""
        self.now = Moment(self.now.time + seconds, Past(call, seconds, self.now.past))

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        """`Runtime.parallel`: all calls begin now, and the driver goes on when the last has ended."""
        begun, latest, results = self.now, self.now, []
        for call in calls:
            self.now = begun
            results.append(call())
            latest = max(latest, self.now, key=lambda moment: moment.time)
        self.now = latest
        return results

    def background(self, call: Callable[[], T]) -> ClockTask[T]:
        """`Runtime.background`: the call begins now, and the driver goes on at once."""
        begun = self.now
        result = call()
        task = ClockTask(self, result, self.now)
        self.now = begun
        return task

    def critical(self) -> dict[str, float]:
        """Seconds of each call on the way that decided the present time."""
        found: dict[str, float] = defaultdict(float)
        past = self.now.past
        while past is not None:
            found[past.call] += past.seconds
            past = past.before
        return found


@dataclass
class ClockTask(Generic[T]):
    """A result and the time at which it is there."""

    clock: Clock
    value: T
    ended: Moment = field(default_factory=Moment)

    def result(self, timeout: float | None = None) -> T:
        self.clock.now = max(self.clock.now, self.ended, key=lambda moment: moment.time)
        return self.value

    def done(self) -> bool:
        return True
