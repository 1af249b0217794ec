"""The learning rate as a function of the number of updates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.config import RateConfig
from flashdmd_ray.engine.optimizers import learning_rate

RATES = st.builds(
    lambda lr, warmup, fall, floor: RateConfig(
        lr=lr, warmup=warmup, decay=fall and warmup + fall, floor=floor if fall else 0.0
    ),
    st.floats(1e-7, 1.0),
    st.integers(0, 50),
    st.none() | st.integers(1, 100),
    st.floats(0.0, 1.0),
)


def test_rise_fall_and_floor_in_closed_form():
    rate = RateConfig(lr=8e-4, warmup=2, decay=6, floor=0.25)
    rates = [learning_rate(rate, update) for update in range(1, 9)]
    assert rates == pytest.approx([4e-4, 8e-4, 6.5e-4, 5e-4, 3.5e-4, 2e-4, 2e-4, 2e-4])


def test_without_warm_up_the_first_update_falls_already():
    rate = RateConfig(lr=1.0, warmup=0, decay=2)
    assert [learning_rate(rate, update) for update in (1, 2, 3)] == [0.5, 0.0, 0.0]


def test_without_decay_the_rate_stays():
    rate = RateConfig(lr=3e-5, warmup=0)
    assert {learning_rate(rate, update) for update in (1, 100, 100_000)} == {3e-5}


@given(RATES, st.integers(1, 200))
def test_between_floor_and_lr_up_to_the_warm_up_and_down_from_there(rate, update):
    now, then = learning_rate(rate, update), learning_rate(rate, update + 1)
    rounding = 1e-12 * rate.lr
    assert 0 <= now <= rate.lr + rounding
    if update < rate.warmup:
        assert now < then
    else:
        assert rate.floor * rate.lr - rounding <= then <= now + rounding
    if rate.decay is not None and update >= rate.decay:
        assert now == then == rate.floor * rate.lr
