"""The monitor's signals against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.monitor.agreement import agreement, ranks
from flashdmd_ray.monitor.signals import image_signals, reduced, reward_signals


def images(*colours: tuple[int, int, int], size: int = 8) -> torch.Tensor:
    """One group of one-coloured images, uint8 (1, K, 3, size, size)."""
    return torch.stack([torch.tensor(c, dtype=torch.uint8)[:, None, None].expand(3, size, size) for c in colours])[None]


def test_one_coloured_images():
    found = image_signals(images((0, 0, 0), (255, 255, 255), (255, 0, 0), (255, 0, 0)))
    assert found["dark_share"] == found["bright_share"] == 0.25
    assert found["luminance"] == pytest.approx((1 + 2 * 0.2126) / 4)
    assert found["saturation"] == 0.5
    assert found["edge_density"] == found["colour_entropy"] == 0
    # black-white 1, red-black sqrt(1/3) twice, red-white sqrt(2/3) twice, red-red 0: mean over six pairs.
    assert found["group_diversity"] == pytest.approx((1 + 2 * math.sqrt(1 / 3) + 2 * math.sqrt(2 / 3)) / 6)
    assert found["prompt_diversity"] == 0


def test_edges_and_colours_of_stripes():
    stripes = torch.zeros(1, 1, 3, 9, 9, dtype=torch.uint8)
    stripes[..., 1::2] = 255
    found = image_signals(stripes)
    assert found["edge_density"] == 1
    share = 4 / 9
    assert found["colour_entropy"] == pytest.approx(-share * math.log2(share) - (1 - share) * math.log2(1 - share))
    blurred = (stripes.float().mean(dim=-1, keepdim=True).expand_as(stripes)).to(torch.uint8)
    assert image_signals(blurred)["edge_density"] == 0


def test_sixty_four_colours_have_six_bits():
    levels = torch.tensor([0, 85, 170, 255], dtype=torch.uint8)
    every = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 1, 3, 8, 8)
    assert image_signals(every)["colour_entropy"] == pytest.approx(6)


def test_diversity_between_prompts_is_not_that_within():
    groups = torch.cat([images((0, 0, 0), (0, 0, 0)), images((255, 255, 255), (255, 255, 255))])
    found = image_signals(groups)
    assert (found["group_diversity"], found["prompt_diversity"]) == (0, 1)


@pytest.mark.parametrize(
    ("size", "seen"), [((1024, 1024), (256, 256)), ((1000, 500), (250, 125)), ((24, 24), (24, 24))]
)
def test_large_images_are_averaged_over_whole_blocks(size, seen):
    one = torch.zeros(1, 3, *size, dtype=torch.uint8)
    one[..., : size[1] // 2] = 255
    pixels = reduced(one, 256)
    assert pixels.shape[-2:] == seen
    assert pixels.mean().item() == pytest.approx(0.5, abs=0.01)


def test_ranks_share_the_mean_of_equal_values():
    assert ranks(torch.tensor([[3.0, 1.0, 3.0, 7.0]])).tolist() == [[1.5, 0, 1.5, 3]]


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=4, max_size=4, unique=True), min_size=1, max_size=4))
def test_agreement_is_one_under_monotone_changes_and_minus_one_when_reversed(rows):
    values = torch.tensor(rows, dtype=torch.float64)
    same, reverse = agreement(values, values**3 + values), agreement(values, -values)
    assert (same.correlation, same.best_beats_worst) == (pytest.approx(1), 1)
    assert (reverse.correlation, reverse.best_beats_worst) == (pytest.approx(-1), 0)


def test_agreement_of_unrelated_rewards_is_nothing_within_its_error():
    first, second = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    both = agreement(first, second)
    assert abs(both.correlation) < 3 * both.error
    assert both.error == pytest.approx(3**-0.5 / 20, rel=0.1)
    assert abs(both.best_beats_worst - 0.5) < 0.08


def test_disagreement_and_spread():
    one = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    found = reward_signals({"a": one, "b": one * 5 + 1, "c": -one}, latent=["c"])
    assert found["reward/b"] == 8.5
    assert found["latent_correlation"] == pytest.approx(-1)
    assert found["disagreement"] == pytest.approx(1 - (1 - 1 - 1) / 3)
    assert found["spread/b"] == pytest.approx(5 * math.sqrt(1.25))


def test_what_failed_or_says_nothing_is_left_out():
    one = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    two = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 9.0], [5.0, 5.0, 5.0]])
    assert agreement(one, two).correlation == pytest.approx(1)
    assert agreement(one, torch.full((3, 3), float("nan"))) is None
    assert reward_signals({"a": torch.full((2, 2), float("inf"))}) == {}
    assert reward_signals({"a": one}).keys() == {"reward/a", "spread/a"}
