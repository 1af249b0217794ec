"""Reward models by kind. A reward is never a score: "score" is the score estimator's word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flashdmd_ray.catalog import published
from flashdmd_ray.config import RewardConfig, validated
from flashdmd_ray.models.latent_reward import LatentRewardModel, load_latent_reward, load_lpo
from flashdmd_ray.models.reward_files import is_lpo
from flashdmd_ray.models.rewards.aesthetic import Aesthetic
from flashdmd_ray.models.rewards.base import BatchedReward, ImageFeatures, PixelReward, RewardSource
from flashdmd_ray.models.rewards.clip import ClipScore, PickScore
from flashdmd_ray.models.rewards.custom import Custom
from flashdmd_ray.models.rewards.hpsv2 import HPSv2
from flashdmd_ray.models.rewards.imagereward import ImageReward
from flashdmd_ray.models.rewards.mps import MPS
from flashdmd_ray.models.rewards.remote import Remote

_PRETRAINED: Mapping[str, Callable[[RewardSource], BatchedReward]] = {
    "pickscore": PickScore.from_source,
    "hpsv2": HPSv2.from_source,
    "hpsv2.1": HPSv2.from_source,
    "imagereward": ImageReward.from_source,
    "clipscore": ClipScore.from_source,
    "aesthetic": Aesthetic.from_source,
    "mps": MPS.from_source,
}


def reward_model(settings: RewardConfig) -> PixelReward | LatentRewardModel:
    """The frozen reward model of one entry of the configuration, on the CPU. `settings.path` is not 'demo' any more.

    Raises ValueError, one line, when `path` holds no such model or something that it needs is not installed.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if settings.kind == "latent":
        if is_lpo(settings.path):
            return load_lpo(settings.path, settings.base, dtype)
        return load_latent_reward(settings.path).to(dtype).requires_grad_(False).eval()
    model = _pixel_reward(settings, dtype).requires_grad_(False).eval()
    model.batch = settings.batch
    return model


def _pixel_reward(settings: RewardConfig, dtype: torch.dtype) -> BatchedReward:
    if settings.kind == "remote":
        assert settings.remote is not None, "filled in by the configuration"
        return Remote(settings.path, settings.remote)
    if settings.kind == "custom":
        return Custom.from_path(settings.path, settings.options)
    files = published.REWARD_KINDS[settings.kind].files
    source = RewardSource(settings.kind, settings.path, settings.base_path, dtype, files)
    return _PRETRAINED[settings.kind](source)


def build_reward(kind: str, path: str, **settings: Any) -> PixelReward | LatentRewardModel:
    """As `reward_model`, from the fields of a `RewardConfig` by name.

    Raises ValueError for a kind that is unknown too.
    """
    return reward_model(validated(RewardConfig, {"kind": kind, "path": path, **settings}))


__all__ = [
    "BatchedReward",
    "ImageFeatures",
    "LatentRewardModel",
    "PickScore",
    "PixelReward",
    "build_reward",
    "reward_model",
]
