"""A family is one row and one file, a reward is one row and one file: a toy of each goes through configuration, plan and loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashdmd_ray import plan
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.catalog.rewards import REWARDS, RewardEntry
from flashdmd_ray.config import parse_config
from flashdmd_ray.models import family_class
from flashdmd_ray.models.rewards import PickScore, PixelReward, build_reward
from flashdmd_ray.models.sd15 import SD15
from tests.model_folders import model_settings
from tests.models.rewards.small_rewards import write_clip
from tests.tiny import sd15_pipeline


class ToyFamily(SD15):
    """The file of a family."""

    name = "toy"


class Negative(PickScore):
    """The file of a reward."""

    name = "negative"

    def score_batch(self, images, texts):
        return -super().score_batch(images, texts)


@pytest.fixture
def toy_family(monkeypatch):
    row = replace(FAMILIES["sd15"], family=f"{__name__}:ToyFamily", pooled_encoders=(), lpo_base=None)
    monkeypatch.setitem(FAMILIES, "toy", row)


@pytest.fixture
def toy_reward(monkeypatch):
    row = RewardEntry(f"{__name__}:Negative.from_config", "somebody/negative", base="somebody/clip")
    monkeypatch.setitem(REWARDS, "negative", row)


@pytest.mark.usefixtures("toy_family")
def test_a_family_is_one_row_and_one_file(tmp_path):
    sd15_pipeline().save_pretrained(tmp_path / "teacher")
    settings = model_settings(tmp_path / "others")
    settings["model"] |= {"family": "toy", "teacher": str(tmp_path / "teacher")}
    settings |= {"adversarial": {"prompt_projection": False}, "rewards": [settings["rewards"][0]]}
    config = parse_config(settings)
    text = plan.describe(config, *plan.check(config))
    family = family_class(config.model.family).from_config(config.model)
    assert isinstance(family, ToyFamily)
    assert f"{sum(p.numel() for p in family.teacher.parameters()):,}" in text

    with pytest.raises(ValueError, match=r"adversarial\.prompt_projection: model\.family 'toy' has no pooled"):
        parse_config(settings | {"adversarial": {"prompt_projection": True}})
    with pytest.raises(ValueError, match=r"model\.family: unknown family 'toi', did you mean 'toy'"):
        parse_config(settings | {"model": {"family": "toi"}})


@pytest.mark.usefixtures("toy_reward")
def test_a_reward_is_one_row_and_one_file(tmp_path):
    folder = write_clip(tmp_path / "clip")
    settings = model_settings(tmp_path / "others")
    settings["rewards"] = [{"kind": "negative", "path": str(folder)}]
    config = parse_config(settings)
    assert "reward: negative" in {part.name for part in plan.check(config)[1]}
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    toy, stock = (build_reward(kind, str(folder)) for kind in ("negative", "pickscore"))
    assert isinstance(toy, PixelReward)
    assert torch.equal(toy.score(images, ["a", "b"]), -stock.score(images, ["a", "b"]))
    with pytest.raises(ValueError, match=r"rewards\.0: path: the package has no demo weights .* somebody/negative"):
        parse_config(settings | {"rewards": [{"kind": "negative"}]})
