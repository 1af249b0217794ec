"""What holds for every published reward: on small random models of its class, read from its published files."""

from __future__ import annotations

import pytest
import torch

from flashdmd_ray.catalog.rewards import REWARDS
from flashdmd_ray.models.rewards import PixelReward
from tests.models.rewards.small_rewards import TEXTS, WRITERS, bytes_as_images, noise_bytes, photos, small_reward

KINDS = [kind for kind in WRITERS if kind != "hpsv2.1"]  # hpsv2's class


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return tmp_path_factory.mktemp(request.param)


@pytest.fixture(scope="module")
def reward(folder):
    return small_reward(folder.name.removesuffix("0"), folder)


def test_every_kind_of_the_configuration_is_here():
    assert {*WRITERS, "latent", "latent_clip", "remote", "custom"} == set(REWARDS)


def test_it_is_frozen_and_tells_images_apart(reward):
    assert isinstance(reward, PixelReward)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.modules())
    rewards = reward.score(bytes_as_images(noise_bytes(4, 20, 20)), ["a red 4"] * 4)
    assert rewards.shape == (4,)
    assert rewards.dtype == torch.float32
    assert rewards.std() > 1e-3 * rewards.abs().max()


def test_a_reward_depends_on_its_own_image_and_text_alone(reward):
    """Alone, in another order, in batches of any size: the same reward for the same pair."""
    images = bytes_as_images(noise_bytes(5, 17, 33))
    with torch.no_grad():
        together = reward.score(images, TEXTS)
        alone = torch.cat([reward.score(images[i : i + 1], TEXTS[i : i + 1]) for i in range(5)])
        reverse = reward.score(images.flip(0), TEXTS[::-1]).flip(0)
        reward.batch = 2
        in_batches = reward.score(images, TEXTS)
        reward.batch = 16
    for other in (alone, reverse, in_batches):
        torch.testing.assert_close(together, other, rtol=1e-5, atol=1e-5 * together.abs().max().item())


def test_nothing_is_rewarded_with_nothing(reward):
    assert reward.score(torch.zeros(0, 3, 20, 20), []).shape == (0,)


def test_texts_are_read_except_by_the_aesthetic(reward):
    images = bytes_as_images(noise_bytes(1, 20, 20)).expand(2, -1, -1, -1)
    one, other = reward.score(images, ["a red 4", "b b b"]).tolist()
    assert (one == pytest.approx(other, rel=1e-6)) == (reward.name == "aesthetic")


def test_the_gradient_in_the_pixels_is_the_slope(reward):
    images = (bytes_as_images(photos(2, 20, 27)) * 0.9).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, ["a", "b"]).sum(), images)
    step = 0.02 * gradient / gradient.abs().max()
    with torch.no_grad():
        gain = reward.score(images + step, ["a", "b"]).sum() - reward.score(images - step, ["a", "b"]).sum()
    torch.testing.assert_close(gain, 2 * (step * gradient).sum(), rtol=0.03, atol=0)


def test_features_have_unit_length(reward):
    if hasattr(reward, "features"):
        lengths = reward.features(bytes_as_images(noise_bytes(3, 20, 20))).norm(dim=-1)
        torch.testing.assert_close(lengths, torch.ones(3))
    else:
        assert reward.name == "imagereward"


def test_half_precision_stays_near(reward, folder):
    images = bytes_as_images(photos(3, 20, 20))
    half = small_reward(reward.name, folder, dtype="bfloat16")
    assert all(p.dtype == torch.bfloat16 for p in half.parameters() if p.is_floating_point())
    rewards, whole = half.score(images, TEXTS[:3]), reward.score(images, TEXTS[:3])
    assert rewards.dtype == torch.float32
    assert (rewards - whole).abs().max() < 0.1 * max(1.0, whole.abs().max().item())
