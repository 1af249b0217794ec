"""Latent reward models: rewards of noisy latents at any timestep, without decoding them.

One file per form: `unet` (SDXL, SD1.5/2.1) and `mmdit` (SD3, SD3.5), behind the class of `base`; `saved` reads and writes directories;
`lpo` reads those that LPO's authors published.
"""

from __future__ import annotations

from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward.base import LatentRewardModel
from flashdmd_ray.models.latent_reward.lpo import LPOReward, load_lpo
from flashdmd_ray.models.latent_reward.mmdit import MMDiTLatentReward
from flashdmd_ray.models.latent_reward.saved import load_latent_reward, save_latent_reward
from flashdmd_ray.models.latent_reward.unet import UNetLatentReward

__all__ = [
    "LPOReward",
    "LatentRewardModel",
    "MMDiTLatentReward",
    "UNetLatentReward",
    "latent_reward_of",
    "load_latent_reward",
    "load_lpo",
    "save_latent_reward",
]


def latent_reward_of(family: Family, blocks: int | None = None) -> LatentRewardModel:
    """An untrained latent reward whose blocks are copies of the teacher's, float32 on the family's device; the projection is random.

    blocks: of an MMDiT, how many it keeps; None is the first half. Raises ValueError where that means nothing.
    """
    network = family.teacher.network
    if family.name == "sd3":
        return MMDiTLatentReward.from_transformer(network, blocks).to(family.device)
    if blocks is not None:
        raise ValueError(f"a latent reward of family '{family.name}' has the U-Net's down and mid blocks; leave null")
    return UNetLatentReward.from_unet(network).to(family.device)
