"""Networks and what they need to be loaded: the teacher families behind `Denoiser`, SAM, the discriminator, reward models.

Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashdmd_ray.catalog import import_object
from flashdmd_ray.catalog.families import FAMILIES

if TYPE_CHECKING:
    from flashdmd_ray.models.denoiser import Denoiser
    from flashdmd_ray.models.family import Family
    from flashdmd_ray.models.latent_reward import LatentRewardModel


def family_class(name: str) -> type[Family]:
    """The class of the family called `name` in the configuration."""
    family: type[Family] = import_object(FAMILIES[name].family)
    return family


def denoiser_class(name: str) -> type[Denoiser]:
    """The class of that family's denoiser."""
    denoiser: type[Denoiser] = import_object(FAMILIES[name].denoiser_class)
    return denoiser


def latent_reward_class(name: str) -> type[LatentRewardModel]:
    """The class of the latent rewards that are made of that family's denoiser."""
    model: type[LatentRewardModel] = import_object(FAMILIES[name].latent_reward)
    return model
