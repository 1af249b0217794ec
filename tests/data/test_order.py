"""The order of samples: laws of a permutation, whatever the seed, the sizes and the mixing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdmd_ray.data.order import Order, permute

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
seeds = st.integers(0, 2**40)
block_counts = st.one_of(st.none(), st.integers(1, 14))


@given(count=st.integers(1, 3000), key=st.integers(0, 2**40).map(str))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation(count, key):
    assert sorted(permute(np.arange(count), count, key).tolist()) == list(range(count))


@given(sizes=sizes, seed=seeds, shuffle_blocks=block_counts, epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_every_sample_comes_once_in_every_epoch(sizes, seed, shuffle_blocks, epoch):
    order = Order(sizes, seed, shuffle_blocks)
    count = sum(sizes)
    positions = epoch * count + np.arange(count)
    assert sorted(order.samples("reals", positions).tolist()) == list(range(count))


@given(
    sizes=sizes,
    seed=seeds,
    shuffle_blocks=block_counts,
    workers=st.integers(1, 7),
    start=st.integers(0, 5000),
    steps=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_how_positions_are_shared_out(sizes, seed, shuffle_blocks, workers, start, steps):
    """Batches cut over workers, asked for in any order and one by one, are the slice of the one order."""
    positions = start + np.arange(workers * 3 * steps)
    whole = Order(sizes, seed, shuffle_blocks).samples("reals", positions)
    for worker in range(workers):
        alone = Order(sizes, seed, shuffle_blocks)  # as another process would make it
        mine = positions.reshape(steps, workers, 3)[::-1, worker].ravel()
        expected = whole.reshape(steps, workers, 3)[::-1, worker].ravel()
        assert alone.samples("reals", mine).tolist() == expected.tolist()
        assert [int(alone.samples("reals", np.array([p]))[0]) for p in mine] == expected.tolist()


@given(sizes=sizes, seed=seeds, shuffle_blocks=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_mixing_stays_within_its_blocks(sizes, seed, shuffle_blocks):
    """Between two positions that lie less than a group apart, no more blocks are touched than two groups have."""
    order = Order(sizes, seed, shuffle_blocks)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    blocks = owner[order.samples("reals", np.arange(sum(sizes)))]
    last = {block: int(np.flatnonzero(blocks == block)[-1]) for block in set(blocks.tolist())}
    first = {block: int(np.flatnonzero(blocks == block)[0]) for block in set(blocks.tolist())}
    for position in range(len(blocks)):
        open_now = [block for block in first if first[block] <= position <= last[block]]
        assert len(open_now) <= shuffle_blocks


def test_seeds_streams_and_epochs_differ_and_are_pinned():
    order = Order([50], seed=3)
    now = np.arange(50)
    rows = [
        order.samples("a", now),
        order.samples("b", now),
        order.samples("a", now + 50),
        Order([50], 4).samples("a", now),
    ]
    assert len({tuple(row.tolist()) for row in rows}) == 4
    assert Order([10], seed=0).samples("reals", np.arange(12)).tolist() == PINNED  # runs of today resume for ever


@pytest.mark.parametrize("count", [5, 16, 300])
def test_every_place_is_equally_likely(count):
    """Where sample 0 lands over many keys: a chi-square statistic of count - 1 degrees of freedom, within 5 sigma."""
    draws = 400 * min(count, 16)
    landed = np.array([permute(np.array([0]), count, f"{i}")[0] for i in range(draws)])
    bins = np.bincount(landed * min(count, 16) // count, minlength=min(count, 16))
    shares = np.bincount(np.arange(count) * min(count, 16) // count, minlength=len(bins)) / count
    statistic = float(((bins - draws * shares) ** 2 / (draws * shares)).sum())
    freedom = len(bins) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


PINNED = [9, 2, 6, 8, 1, 3, 4, 7, 5, 0, 9, 1]
