"""Measure several ways to do the same thing in turn, so that other work on the machine hits all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping

Way = Callable[[int], object]
Seconds = Mapping[str, tuple[float, float]]
"""Seconds of one round for each way: (elapsed, CPU)."""


def measure_rounds(ways: Mapping[str, Way], budget_s: float, cpu_seconds: Callable[[], float]) -> list[Seconds]:
    """Measure as many rounds as fit, three at least. Every second round runs in the opposite order; a first one does not count."""
    measured: list[Seconds] = []
    end = time.perf_counter() + budget_s
    for number in itertools.count():
        if len(measured) > 3 and time.perf_counter() > end:
            return measured[1:]
        seconds = {}
        for name in ways if number % 2 else reversed(ways):  # type: ignore[call-overload]
            started, cpu = time.perf_counter(), cpu_seconds()
            ways[name](number)
            seconds[name] = (time.perf_counter() - started, cpu_seconds() - cpu)
        measured.append(seconds)
    raise AssertionError("unreachable")


def compare(rounds: list[Seconds], ours: str, other: str) -> dict[str, object]:
    """Ratios within the rounds as "median [quartiles]", of seconds and of CPU seconds, and the medians of both."""
    return {
        "time": spread([seconds[ours][0] / seconds[other][0] for seconds in rounds]),
        "cpu": spread([seconds[ours][1] / seconds[other][1] for seconds in rounds]),
        "ours_s": statistics.median(seconds[ours][0] for seconds in rounds),
        "other_s": statistics.median(seconds[other][0] for seconds in rounds),
        "ours_cpu_s": statistics.median(seconds[ours][1] for seconds in rounds),
        "other_cpu_s": statistics.median(seconds[other][1] for seconds in rounds),
    }


def describe(figures: Mapping[str, object]) -> str:
    """`compare` in one line."""
    return (
        f"time {figures['time']}, CPU time {figures['cpu']}; medians {figures['ours_s']:.3f} s against {figures['other_s']:.3f} s, "
        f"CPU {figures['ours_cpu_s']:.3f} s against {figures['other_cpu_s']:.3f} s"
    )


def spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"
