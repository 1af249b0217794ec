"""Latent reward models: rewards of noisy latents at any timestep, without decoding them.

One file per form: `unet` (SDXL, SD1.5/2.1) and `mmdit` (SD3, SD3.5), behind the class of `base`; `saved` reads and writes directories;
`lpo` reads those that LPO's authors published.
"""

from __future__ import annotations

import torch

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models import latent_reward_class
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward.base import LatentRewardModel, NoisyLatentReward
from flashdmd_ray.models.latent_reward.lpo import LPOReward, load_lpo
from flashdmd_ray.models.latent_reward.mmdit import MMDiTLatentReward
from flashdmd_ray.models.latent_reward.saved import load_latent_reward, save_latent_reward
from flashdmd_ray.models.latent_reward.unet import UNetLatentReward
from flashdmd_ray.models.reward_files import is_lpo

__all__ = [
    "LPOReward",
    "LatentRewardModel",
    "MMDiTLatentReward",
    "NoisyLatentReward",
    "UNetLatentReward",
    "latent_reward_of",
    "load_latent_reward",
    "load_lpo",
    "reward_from_config",
    "save_latent_reward",
]


def latent_reward_of(family: Family, blocks: int | None = None) -> LatentRewardModel:
    """An untrained latent reward whose blocks are copies of the teacher's, float32 on the family's device; the projection is random.

    blocks: of an MMDiT, how many it keeps; None is the first half. Raises ValueError where that means nothing.
    """
    return latent_reward_class(family.name).from_denoiser(family.teacher.network, blocks).to(family.device)


def reward_from_config(settings: RewardConfig) -> LatentRewardModel:
    """The frozen latent reward at `settings.path`: a saved one, or LPO's. Raises ValueError when there is none."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    if is_lpo(settings.path):
        return load_lpo(settings.path, settings.base, dtype)
    return load_latent_reward(settings.path).to(dtype).requires_grad_(False).eval()
