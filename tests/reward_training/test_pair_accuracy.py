"""Accuracies and their intervals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.reward_training.accuracy import Counts, as_report, table, wilson
from flashdmd_ray.reward_training.pairs import Pairs


def pairs_of(labels: list[float], truth: list[float] | None = None) -> Pairs:
    made = torch.tensor(labels)
    return Pairs(
        torch.zeros(len(labels), 2, 3, 1, 1), ("",) * len(labels), made, made if truth is None else torch.tensor(truth)
    )


def test_wilson_intervals_of_published_examples() -> None:
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29, by the score method without continuity correction.
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 500), st.data())
def test_wilson_intervals_hold_the_share_mirror_and_shrink(count: int, data) -> None:
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    assert wilson(count - right, count) == pytest.approx((1 - high, 1 - low))
    wide = wilson(right, count, 2.6)
    assert wide[0] <= low
    assert high <= wide[1]
    more = wilson(10 * right, 10 * count)
    assert more[1] - more[0] < high - low


def test_ties_of_labels_do_not_count_and_ties_of_rewards_count_a_half() -> None:
    counts = Counts()
    rewards = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    counts.add("own/9", rewards, pairs_of([1.0, 1.0, 0.0, 0.5]))
    assert counts.of["labels/own/9"] == [1.5, 3.0]


def test_the_report_shows_both_references_only_where_they_differ() -> None:
    for truth, references in (([1.0, 0.0], ["labels"]), ([0.0, 0.0], ["labels", "truth"])):
        counts, pairs = Counts(pairs=2), pairs_of([1.0, 0.0], truth)
        for name in ("own/9", "shared/9", "pixel/judge"):
            counts.add(name, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), pairs)
        report = as_report(counts, [9], ["judge"])
        assert list(report["against"]) == references
        found = report["against"][references[-1]]["latent"]["9"]["own"]
        assert found["accuracy"] == (1.0 if len(references) == 1 else 0.5)
        assert found["count"] == 2
        assert not found["above_chance_99"], "two pairs prove nothing"
        text = "\n".join(table(report))
        assert "| latent | t = 9 |" in text
        assert "| judge | the clean image |" in text
