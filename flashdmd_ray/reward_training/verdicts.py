"""Verdicts of pixel rewards on pairs of clean images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.losses.preference import combine_rewards
from flashdmd_ray.models.rewards import PixelReward
from flashdmd_ray.roles.reward import load_reward


def load_judges(configs: Sequence[RewardConfig], device: torch.device) -> dict[str, PixelReward]:
    """The configured pixel rewards by label, frozen, on `device`. Raises ValueError for one that cannot be loaded."""
    judges = {}
    for config in configs:
        judge = load_reward(config)
        assert isinstance(judge, PixelReward), "the configuration refuses others"
        judges[config.label] = judge.to(device)
    return judges


@torch.no_grad()
def judge(judges: Mapping[str, PixelReward], images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
    """label -> rewards float32 (B, 2), on the CPU, of pairs of images float (B, 2, 3, H, W) in [-1, 1], one text each."""
    both = [text for text in texts for _ in range(2)]
    return {
        label: model.score(images.flatten(0, 1), both).unflatten(0, (-1, 2)).cpu() for label, model in judges.items()
    }


def verdicts(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Labels float32 (B,): 1 the first image is better, 0 the second, 0.5 the rewards are even; NaN where one of them is not finite.

    Every reward is normalised within its pair, as in preference updates, so it has a vote of its weight, however large its scale is.
    """
    combined, kept = combine_rewards(dict(rewards), dict(weights))
    difference = torch.nan_to_num(combined[:, 0] - combined[:, 1])
    label = 0.5 + 0.5 * difference.sign() * (difference.abs() > 1e-6)
    return torch.where(kept, label, torch.nan)
