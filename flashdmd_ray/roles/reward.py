"""Reward: scores groups of candidates. Frozen models, in pixel space or on the noisy latent itself."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.diffusion.sampling import full
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import LatentRewardModel
from flashdmd_ray.models.rewards import PixelReward, build_reward
from flashdmd_ray.roles.networks import group_family, resolve


class Reward:
    """Every configured reward, by label. A reward that is not finite is passed on as it is: the pair selection drops its group."""

    def __init__(self, config: Config, family: Family, models: dict[str, PixelReward | LatentRewardModel]):
        self.config = config
        self.family = family
        self.models = models

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Reward:
        family = group_family(config, "reward", ("vae", "text"))
        return cls(config, family, {reward.label: load_reward(reward).to(family.device) for reward in config.rewards})

    @property
    def device(self) -> torch.device:
        """Where its networks compute."""
        return self.family.device

    @torch.no_grad()
    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        """label -> float32 (B, K)."""
        groups, count = candidates.values.shape[:2]
        texts = [text for text in candidates.prompts.texts for _ in range(count)]
        images = self.family.decode(candidates.clean.flatten(0, 1)) if candidates.clean.shape[1] else None
        rewards = {}
        for label, model in self.models.items():
            if isinstance(model, LatentRewardModel):
                scores = self._score_latents(model, candidates, texts)
            else:
                assert images is not None, "a pixel reward needs the candidates' clean latents"
                scores = model.score(images, texts)
            rewards[label] = scores.unflatten(0, (groups, count))
        return rewards

    def _score_latents(self, model: LatentRewardModel, candidates: Candidates, texts: list[str]) -> Tensor:
        latents = candidates.values.flatten(0, 1)
        timestep = (
            candidates.timestep if self.config.preference.reward_timestep == "current" else candidates.next_timestep
        )
        return model.score(latents, full(timestep, latents), texts, self.family)


def load_reward(config: RewardConfig) -> PixelReward | LatentRewardModel:
    """The reward model of one configuration entry, frozen."""
    part = "latent_reward" if config.kind == "latent" else "reward"
    return build_reward(config.kind, resolve(config.path, part))
