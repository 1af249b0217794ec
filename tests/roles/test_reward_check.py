"""What start-up refuses to train towards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from flashdmd_ray.config import RewardConfig, load_config
from flashdmd_ray.roles.reward import Reward
from flashdmd_ray.roles.reward_check import check_rewards, known_image


class Roughness:
    """A reward that prefers smooth images, times `sign`."""

    name = "smooth"

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        assert len(images) == len(texts)
        return -self.sign * images.diff(dim=3).abs().mean(dim=(1, 2, 3))

    def to(self, device: torch.device | str) -> Roughness:
        return self


class Brightness(Roughness):
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        return self.sign * images.mean(dim=(1, 2, 3))


class Broken(Roughness):
    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        raise KeyError("no such\nlayer")


def check(model: Roughness, **settings: str) -> None:
    config = load_config(None, ["rewards=[{kind: pickscore, name: mine}]"])
    reward = RewardConfig(kind="pickscore", name="mine", **settings)
    check_rewards(config.model_copy(update={"rewards": (reward,)}), {"mine": model}, torch.device("cpu"), None)


def test_a_reward_that_prefers_noise_is_refused_unless_its_owner_says_why():
    check(Roughness(1.0))
    check(Brightness(1.0))  # the same pixels in another order are as bright
    check(Brightness(-1.0))
    with pytest.raises(ValueError, match=r"'mine' \(pickscore, demo\) prefers noise .* `skip_noise_check`") as refusal:
        check(Roughness(-1.0))
    assert "\n" not in str(refusal.value)
    check(Roughness(-1.0), skip_noise_check="measures roughness")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_whatever_its_owner_says(value):
    with pytest.raises(ValueError, match="a reward must be finite"):
        check(Roughness(value), skip_noise_check="whatever")


def test_a_reward_that_raises_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"cannot score a known image: KeyError: .*layer") as refusal:
        check(Broken(1.0))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [(24, 24), (64, 96)])
def test_the_known_image_and_its_ruin_have_the_same_pixels(size):
    images, texts = known_image(*size)
    assert images.shape == (2, 3, *size)
    assert len(texts) == 2
    assert torch.equal(images[0].flatten(1).sort(dim=1).values, images[1].flatten(1).sort(dim=1).values)
    assert images[0].diff(dim=2).abs().mean() < images[1].diff(dim=2).abs().mean() / 2


def test_the_packaged_rewards_pass_and_one_made_upside_down_does_not(monkeypatch):
    config = load_config(None, ["runtime=local"]).for_pool("reward")
    models = Reward.from_config(config).models
    latent = models["latent"]
    forward = type(latent).forward
    monkeypatch.setattr(type(latent), "forward", lambda self, *inputs: -forward(self, *inputs))
    with pytest.raises(ValueError, match=r"'latent' \(latent, demo\) prefers noise"):
        Reward.from_config(config)
