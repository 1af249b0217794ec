"""Reward: scores groups of candidates. Frozen models of images and texts, or of the noisy latent itself."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates, from_uint8
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.diffusion.sampling import timesteps_like
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.rewards import PixelReward, reward_model
from flashdmd_ray.roles.networks import group_device, group_family
from flashdmd_ray.roles.reward_check import check_rewards


class Reward:
    """The rewards of one pool, by label: those of the configuration it is given, see `Config.for_pool`.

    A reward that is not finite is passed on as it is: the pair selection drops its group.
    """

    def __init__(
        self,
        config: Config,
        models: dict[str, PixelReward | NoisyLatentReward],
        device: torch.device,
        family: Family | None = None,
    ):
        """device: where its networks compute. family: the teacher's, for latent rewards."""
        self.config = config
        self.models = models
        self.device = device
        self.family = family

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Reward:
        """Raises ValueError, one line, for models that cannot be loaded, and for a reward that fails `check_rewards`."""
        device = group_device(config, "reward")
        models = {reward.label: load_reward(reward).to(device) for reward in config.rewards}
        latent = [model for model in models.values() if isinstance(model, NoisyLatentReward)]
        parts = {part for model in latent for part in model.parts}
        family = group_family(config, "reward", parts) if latent else None
        check_rewards(config, models, device, family)
        return cls(config, models, device, family)

    @torch.no_grad()
    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        """label -> float32 (B, K)."""
        groups, count = candidates.values.shape[:2]
        texts = [text for text in candidates.prompts.texts for _ in range(count)]
        images = from_uint8(candidates.images.flatten(0, 1))
        rewards = {}
        for label, model in self.models.items():
            if isinstance(model, NoisyLatentReward):
                scores = self._score_latents(label, model, candidates, texts)
            else:
                assert len(images) == len(texts), "a pixel reward needs the candidates' images"
                scores = model.score(images, texts)
            rewards[label] = scores.unflatten(0, (groups, count))
        return rewards

    def _score_latents(self, label: str, model: NoisyLatentReward, candidates: Candidates, texts: list[str]) -> Tensor:
        latents = candidates.values.flatten(0, 1)
        timestep = (
            candidates.timestep if self.config.preference.reward_timestep == "current" else candidates.next_timestep
        )
        assert self.family is not None, "latent rewards read the teacher's schedule and text embeddings"
        size = next(reward.batch for reward in self.config.rewards if reward.label == label)
        parts = [
            model.score(noisy, timesteps_like(timestep, noisy), texts[start : start + size], self.family)
            for start, noisy in zip(range(0, len(texts), size), latents.split(size), strict=True)
        ]
        return torch.cat(parts)


def load_reward(config: RewardConfig) -> PixelReward | NoisyLatentReward:
    """The reward model of one configuration entry, frozen."""
    return reward_model(config)
