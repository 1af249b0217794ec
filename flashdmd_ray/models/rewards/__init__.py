"""Reward models by kind. A reward is never a score: "score" is the score estimator's word."""

from __future__ import annotations

from collections.abc import Callable

from flashdmd_ray.config import LATER_REWARD_KINDS, suggestion
from flashdmd_ray.models.latent_reward import LatentRewardModel, load_latent_reward
from flashdmd_ray.models.rewards.base import ImageFeatures, PixelReward
from flashdmd_ray.models.rewards.pickscore import PickScore


def _load_latent(path: str) -> LatentRewardModel:
    return load_latent_reward(path).requires_grad_(False).eval()


_LOADERS: dict[str, Callable[[str], PixelReward | LatentRewardModel]] = {
    "pickscore": PickScore.from_pretrained,
    "latent": _load_latent,
}


def build_reward(kind: str, path: str) -> PixelReward | LatentRewardModel:
    """The frozen reward model of that kind in `path`, a directory or a hub id.

    Raises ValueError for a kind that is unknown or not implemented yet, and when `path` holds no such model.
    """
    if kind in LATER_REWARD_KINDS:
        raise ValueError(
            f"the reward {kind!r} is known but not implemented yet: its published weights need a pre-processing or head of"
            f" their own; use one of {', '.join(_LOADERS)}"
        )
    if kind not in _LOADERS:
        raise ValueError(f"unknown reward {kind!r}{suggestion(kind, tuple(_LOADERS))}; known: {', '.join(_LOADERS)}")
    return _LOADERS[kind](path)


__all__ = ["ImageFeatures", "LatentRewardModel", "PickScore", "PixelReward", "build_reward"]
