"""Preference loss, reward combination and pair selection, from first principles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from flashdmd_ray.config import PreferenceConfig
from flashdmd_ray.diffusion.sampling import step_distribution
from flashdmd_ray.losses.preference import (
    combine_rewards,
    log_ratio_difference,
    pair_weights,
    preference_loss,
    select_pairs,
)
from tests.gaussian import FAMILIES, normal

SHAPE = (3, 4, 2, 2)
NAN, INF = float("nan"), float("inf")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), std=st.floats(0.2, 1.0))
def test_h_is_the_difference_of_gaussian_log_densities(seed, std):
    """torch.distributions' log-density, its sum over CHW divided by the root of their number; no term cancelled by hand; in float64."""
    mean_theta, mean_ref, winners, losers = (normal(SHAPE, seed + i).double() for i in range(4))

    def log_density(mean, z):
        return Normal(mean, std).log_prob(z).sum(dim=(1, 2, 3)) / z[0].numel() ** 0.5

    expected = (log_density(mean_theta, winners) - log_density(mean_ref, winners)) - (
        log_density(mean_theta, losers) - log_density(mean_ref, losers)
    )
    torch.testing.assert_close(
        log_ratio_difference(mean_theta, mean_ref, winners, losers, std), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beta", [0.1, 500.0])
def test_at_the_reference_h_is_zero_and_the_loss_log_2(family, beta):
    x0 = normal(SHAPE, 0)
    mean, std = step_distribution(FAMILIES[family], x0, 749)
    winners, losers = mean + std * normal(SHAPE, 1), mean + std * normal(SHAPE, 2)
    ratio = log_ratio_difference(mean, mean.clone(), winners, losers, std)
    assert torch.equal(ratio, torch.zeros(3))
    assert preference_loss(ratio, beta, torch.ones(3)).item() == pytest.approx(math.log(2), rel=1e-7)


def test_the_gradient_moves_the_mean_towards_the_winner():
    """dL/dmu at the reference is -(beta / 2) (z_w - z_l) / (std^2 sqrt(CHW) B)."""
    mean = normal(SHAPE, 0).requires_grad_()
    winners, losers, std, beta = normal(SHAPE, 1), normal(SHAPE, 2), 0.5, 3.0
    preference_loss(log_ratio_difference(mean, mean.detach(), winners, losers, std), beta, torch.ones(3)).backward()
    torch.testing.assert_close(
        mean.grad, -beta / 2 * (winners - losers) / std**2 / (mean[0].numel() ** 0.5 * len(mean))
    )


def log_ratios(side: int, change: float) -> tuple[torch.Tensor, ...]:
    """Policy, reference, winners and losers of 200 pairs at std .9, the policy `change` per number away from the reference."""
    shape, std = (200, 3, side, side), 0.9
    reference = normal(shape, 0)
    mean = reference + change * normal(shape, 1)
    return mean, reference, mean + std * normal(shape, 2), mean + std * normal(shape, 3)


def test_beta_means_the_same_at_every_resolution():
    spreads = [log_ratio_difference(*log_ratios(side, 0.05), 0.9).std().item() for side in (8, 64)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.15)
    assert spreads[1] == pytest.approx(2**0.5 * 0.05 / 0.9, rel=0.15)


def test_the_reference_policy_acts_at_the_default_beta():
    """A policy .05 per number from its reference (the demo drifts by .05 to .1): with another reference the gradient is another."""
    mean, reference, winners, losers = log_ratios(12, 0.05)
    gradients, sizes = [], []
    for anchor in (reference, mean.clone()):
        policy = mean.clone().requires_grad_()
        ratio = log_ratio_difference(policy, anchor, winners, losers, 0.9)
        preference_loss(ratio, PreferenceConfig().beta, torch.ones(200)).backward()
        gradients.append(policy.grad)
        sizes.append((PreferenceConfig().beta * ratio).abs().mean().item())
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()
    assert 0.3 < sizes[0] < 3


def test_the_loss_written_out():
    ratio = torch.tensor([0.0, 2.0, -1.0])
    expected = sum(math.log(1 + math.exp(-0.5 * h)) for h in ratio.tolist()) / 3
    assert preference_loss(ratio, 0.5, torch.ones(3)).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(preference_loss(torch.tensor([-1e4]), 500.0, torch.ones(1)))


def test_exchanging_winner_and_loser_turns_h_around():
    tensors = [normal(SHAPE, i) for i in range(4)]
    forwards = log_ratio_difference(*tensors, 0.5)
    assert torch.equal(log_ratio_difference(tensors[0], tensors[1], tensors[3], tensors[2], 0.5), -forwards)
    assert forwards.abs().min() > 0


def test_dropped_pairs_weigh_nothing_even_when_they_are_broken():
    ratio = torch.tensor([1.0, NAN, INF, -1.0], requires_grad=True)
    keep = torch.tensor([True, False, False, True])
    loss = preference_loss(ratio, 1.0, pair_weights(keep))
    kept_alone = preference_loss(torch.tensor([1.0, -1.0]), 1.0, torch.ones(2))
    torch.testing.assert_close(loss, kept_alone)
    loss.backward()
    assert ratio.grad[1:3].tolist() == [0.0, 0.0]
    assert (ratio.grad[[0, 3]] < 0).all()


def test_kept_pairs_on_uneven_ranks_average_to_the_global_mean():
    ratio, keep = normal((6,), 0), torch.tensor([True, True, True, False, False, True])
    weights = pair_weights(keep)
    ranks = [preference_loss(ratio[i : i + 3], 1.0, weights[i : i + 3]) for i in (0, 3)]
    torch.testing.assert_close(sum(ranks) / 2, preference_loss(ratio[keep], 1.0, torch.ones(4)))


def test_weights_of_full_and_empty_batches():
    assert pair_weights(torch.tensor([True, True])).tolist() == [1.0, 1.0]
    assert pair_weights(torch.tensor([False, False])).tolist() == [0.0, 0.0]
    ratio = torch.tensor([1.0, 2.0], requires_grad=True)
    preference_loss(ratio, 1.0, torch.zeros(2)).backward()
    assert ratio.grad.tolist() == [0.0, 0.0]


def test_half_precision_is_widened_first():
    tensors = [normal(SHAPE, i).bfloat16() for i in range(4)]
    found = log_ratio_difference(*tensors, 0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, log_ratio_difference(*(x.float() for x in tensors), 0.5))


# Rewards


def test_rewards_are_normalised_within_each_group_and_summed():
    clip = torch.tensor([[0.20, 0.21, 0.22, 0.23], [0.1, 0.1, 0.1, 0.5]])
    other = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    combined, kept = combine_rewards({"clip": clip, "other": other}, {"clip": 1.0, "other": 0.5})

    def z(values):
        return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True, correction=0)

    torch.testing.assert_close(combined, z(clip) + 0.5 * z(other), rtol=1e-5, atol=1e-5)
    assert kept.tolist() == [True, True]
    assert combined[0].argmax() == 3  # the heavier reward decides where the two disagree


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10), candidates=st.integers(2, 8))
def test_units_of_a_reward_do_not_matter(seed, scale, offset, candidates):
    rewards = normal((3, candidates), seed).double()
    one, _ = combine_rewards({"r": rewards}, {"r": 1.0})
    other, _ = combine_rewards({"r": scale * (rewards + offset)}, {"r": 1.0})
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(one.square().mean(dim=1), torch.ones(3), rtol=0, atol=1e-4)


def test_order_of_models_and_of_groups_does_not_matter():
    a, b = normal((4, 3), 0), normal((4, 3), 1)
    one, _ = combine_rewards({"a": a, "b": b}, {"a": 1.0, "b": 2.0})
    other, _ = combine_rewards({"b": b.flip(0), "a": a.flip(0)}, {"b": 2.0, "a": 1.0})
    torch.testing.assert_close(one, other.flip(0))


def test_a_reward_that_sees_no_difference_decides_nothing():
    """Equal up to the resolution of float32: its rounding must not be blown up to a verdict."""
    flat = torch.tensor([[0.2200000, 0.2200000, 0.22000001, 0.2200000]])
    clear = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    together, _ = combine_rewards({"flat": flat, "clear": clear}, {"flat": 10.0, "clear": 1.0})
    alone, _ = combine_rewards({"clear": clear}, {"clear": 1.0})
    torch.testing.assert_close(together, alone)
    assert torch.equal(combine_rewards({"flat": flat}, {"flat": 1.0})[0], torch.zeros(1, 4))


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_a_reward_that_is_not_finite_drops_its_group_and_never_counts_as_zero(broken):
    good, bad = normal((3, 4), 0), normal((3, 4), 1)
    bad[1, 2] = broken
    combined, kept = combine_rewards({"good": good, "bad": bad}, {"good": 1.0, "bad": 1.0})
    assert kept.tolist() == [True, False, True]
    assert combined[1].isnan().all()
    assert torch.isfinite(combined[[0, 2]]).all()
    without, _ = combine_rewards({"good": good[[0, 2]], "bad": bad[[0, 2]]}, {"good": 1.0, "bad": 1.0})
    assert torch.equal(combined[[0, 2]], without)
    _, _, margin, keep = select_pairs(combined, threshold=0.0)
    assert keep.tolist() == [True, False, True]
    assert margin[1] == 0


def test_a_held_out_reward_decides_nothing():
    good, held_out = normal((2, 4), 0), torch.full((2, 4), NAN)
    combined, kept = combine_rewards({"good": good, "held_out": held_out}, {"good": 1.0})
    assert torch.equal(combined, combine_rewards({"good": good}, {"good": 1.0})[0])
    assert kept.all()


def test_every_weight_has_its_reward_and_is_above_0():
    with pytest.raises(ValueError, match=r"weights for \['b'\], but rewards of \['a'\]"):
        combine_rewards({"a": normal((1, 2), 0)}, {"a": 1.0, "b": 1.0})
    for weights in ({}, {"a": 0.0}):
        with pytest.raises(ValueError, match="every weight must be above 0"):
            combine_rewards({"a": normal((1, 2), 0)}, weights)


# Pairs


def test_best_against_worst_with_the_softmax_margin():
    rewards = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.1, 0.2, 0.0, 0.15]])
    winner, loser, margin, keep = select_pairs(rewards, threshold=0.5)
    assert winner.tolist() == [1, 1]
    assert loser.tolist() == [3, 2]
    total = sum(math.exp(r) for r in (1, 3, 2, 0))
    assert margin[0].item() == pytest.approx((math.exp(3) - 1) / total, rel=1e-6)
    assert keep.tolist() == [True, False]


def test_the_threshold_is_exclusive_and_the_temperature_sharpens():
    rewards = torch.tensor([[0.0, 1.0]])
    margin = select_pairs(rewards, threshold=0.0)[2].item()
    assert margin == pytest.approx(math.tanh(0.5), rel=1e-6)
    assert not select_pairs(rewards, threshold=margin)[3].item()
    assert select_pairs(rewards, threshold=margin - 1e-6)[3].item()
    assert select_pairs(rewards, 0.0, temperature=0.1)[2] > margin > select_pairs(rewards, 0.0, temperature=10.0)[2]


def test_ties_are_not_kept():
    winner, loser, margin, keep = select_pairs(torch.full((2, 4), 0.3), threshold=0.0)
    assert margin.tolist() == [0.0, 0.0]
    assert keep.tolist() == [False, False]
    assert winner.tolist() == loser.tolist() == [0, 0]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    candidates=st.integers(2, 8),
    threshold=st.floats(0, 0.99),
    temperature=st.floats(0.05, 20),
)
def test_a_kept_pair_is_ordered_and_clear(seed, candidates, threshold, temperature):
    rewards = normal((6, candidates), seed)
    rewards[2, 1] = NAN
    winner, loser, margin, keep = select_pairs(rewards, threshold, temperature)
    assert not keep[2]
    assert ((margin >= 0) & (margin <= 1)).all()
    for i in torch.nonzero(keep).flatten().tolist():
        assert rewards[i, winner[i]] == rewards[i].max() > rewards[i].min() == rewards[i, loser[i]]
        assert margin[i] > threshold


def test_pairs_do_not_depend_on_the_other_groups():
    rewards = normal((5, 4), 0)
    whole = select_pairs(rewards, 0.3)
    for i in range(5):
        for all_groups, one in zip(whole, select_pairs(rewards[i : i + 1], 0.3), strict=True):
            torch.testing.assert_close(all_groups[i : i + 1], one)


@pytest.mark.parametrize(
    ("rewards", "threshold", "temperature", "message"),
    [
        (torch.zeros(3, 1), 0.5, 1.0, "at least 2 candidates"),
        (torch.zeros(3), 0.5, 1.0, "at least 2 candidates"),
        (torch.zeros(3, 4), 1.0, 1.0, "threshold"),
        (torch.zeros(3, 4), -0.1, 1.0, "threshold"),
        (torch.zeros(3, 4), 0.5, 0.0, "temperature"),
    ],
)
def test_impossible_selections_are_refused(rewards, threshold, temperature, message):
    with pytest.raises(ValueError, match=message):
        select_pairs(rewards, threshold, temperature)
