"""Reward models by kind. A reward is never a score: "score" is the score estimator's word."""

from __future__ import annotations

from typing import Any

from flashdmd_ray.catalog import import_object
from flashdmd_ray.config import RewardConfig, validated
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.locations import resolve
from flashdmd_ray.models.rewards.base import BatchedReward, ImageFeatures, PixelReward
from flashdmd_ray.models.rewards.clip import PickScore


def reward_model(settings: RewardConfig) -> PixelReward | NoisyLatentReward:
    """The frozen reward model of one entry of the configuration, on the CPU.

    Raises ValueError, one line, when `path` holds no such model or something that it needs is not installed.
    """
    model: BatchedReward | NoisyLatentReward = import_object(settings.entry.loader)(_located(settings))
    if isinstance(model, BatchedReward):
        model.batch = settings.batch
    return model.requires_grad_(False).eval()


def _located(settings: RewardConfig) -> RewardConfig:
    return settings.model_copy(update={"path": resolve(settings.path, settings.entry.demo)})


def build_reward(kind: str, path: str, **settings: Any) -> PixelReward | NoisyLatentReward:
    """`reward_model` of a `RewardConfig` with these fields."""
    return reward_model(validated(RewardConfig, {"kind": kind, "path": path, **settings}))


__all__ = [
    "BatchedReward",
    "ImageFeatures",
    "NoisyLatentReward",
    "PickScore",
    "PixelReward",
    "build_reward",
    "reward_model",
]
