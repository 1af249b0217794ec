"""How large a growing pool should be, and what its figures mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.runtime.autoscale import GROW_AFTER_S, Demand
from flashdmd_ray.runtime.usage import Usage

SHRINK_AFTER_S = 10.0


def after(*seen: tuple[float, int], size: int, low: int = 1, high: int = 8) -> int:
    demand = Demand(SHRINK_AFTER_S)
    for now, calls in seen:
        demand.note(now, calls)
    return demand.target(size, low, high)


def test_a_lasting_queue_makes_it_grow_to_what_is_asked_for():
    assert after((0.0, 5), (0.25, 5), (0.5, 5), size=1) == 5
    assert after((0.0, 50), (0.25, 50), (0.5, 50), size=1) == 8
    assert after((0.0, 5), (0.25, 0), (0.5, 5), size=1) == 1, "calls that merely follow each other are no queue"
    assert after((0.0, 5), (0.25, 5), size=1) == 1, "too short"


def test_it_shrinks_to_the_most_that_was_needed_for_long():
    quiet = [(float(second), 2 if second == 5 else 0) for second in range(11)]
    assert after(*quiet, size=8) == 2
    assert after(*quiet, size=8, low=3) == 3
    assert after(*quiet[:10], size=8) == 8, "not long enough"
    later = [(float(second), 0) for second in range(11, 17)]
    assert after(*quiet, *later, size=8) == 1


def test_without_a_past_or_outside_its_bounds():
    assert after(size=4) == 4
    assert after(size=9) == 8
    assert after((0.0, 3), size=1, low=2) == 2


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 30)), max_size=40),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(0, 6),
)
def test_it_never_leaves_its_bounds_and_a_steady_demand_is_met(gaps, size, low, more):
    demand, now = Demand(SHRINK_AFTER_S), 0.0
    for gap, calls in gaps:
        now += gap
        demand.note(now, calls)
        size = demand.target(size, low, low + more)
        assert low <= size <= low + more
    for tick in range(100):
        demand.note(now + tick / 4, 4)
        size = demand.target(size, low, low + more)
    assert size == min(max(4, low), low + more)
    assert GROW_AFTER_S < 25


def test_figures_are_shares_of_time():
    now = [0.0]
    usage = Usage(lambda: now[0])
    usage.adjust(ready=2)
    now[0] = 1.0
    usage.adjust(busy=1, waiting=3)
    now[0] = 3.0
    usage.adjust(busy=-1, waiting=-3)
    usage.count_replay(4)
    now[0] = 4.0
    assert usage.take_figures() == {"busy": 2 / 8, "queue": 3, "workers": 2, "replayed": 4}
    now[0] = 5.0
    assert usage.take_figures() == {"busy": 0, "queue": 0, "workers": 2, "replayed": 0}
    assert usage.busy_share == pytest.approx(0)
    assert Usage(lambda: 0.0).take_figures()["busy"] == 0, "nothing is divided by no time"
