"""The 2-way softmax loss of pairs: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.losses.reward_model import pair_loss

_reward = st.floats(-20, 20)


@given(_reward, _reward, st.sampled_from([0.0, 0.5, 1.0]))
def test_it_is_the_cross_entropy_of_the_softmax(first: float, second: float, label: float) -> None:
    p = torch.softmax(torch.tensor([[first, second]], dtype=torch.float64), dim=1)[0]
    expected = -(label * p[0].log() + (1 - label) * p[1].log())
    loss = pair_loss(torch.tensor([[first, second]], dtype=torch.float64), torch.tensor([label]))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


@given(_reward, _reward, _reward, st.sampled_from([0.0, 0.5, 1.0]))
def test_only_the_difference_counts_and_exchanging_the_images_exchanges_the_label(
    first: float, second: float, shift: float, label: float
) -> None:
    def loss(a: float, b: float, y: float) -> float:
        return pair_loss(torch.tensor([[a, b]], dtype=torch.float64), torch.tensor([y])).item()

    assert loss(first, second, label) == pytest.approx(loss(first + shift, second + shift, label), abs=1e-6)
    assert loss(first, second, label) == pytest.approx(loss(second, first, 1 - label), abs=1e-9)


def test_gradient_is_probability_minus_label_and_a_tie_pulls_together() -> None:
    rewards = torch.tensor([[1.0, 0.0], [3.0, 3.0], [2.0, 0.0]], requires_grad=True)
    pair_loss(rewards, torch.tensor([1.0, 0.5, 0.5])).backward()
    sigmoid = [1 / (1 + math.exp(-d)) for d in (1.0, 0.0, 2.0)]
    expected = torch.tensor([[s - y, y - s] for s, y in zip(sigmoid, (1.0, 0.5, 0.5), strict=True)]) / 3
    torch.testing.assert_close(rewards.grad, expected)
    assert rewards.grad[1].abs().max() == 0
