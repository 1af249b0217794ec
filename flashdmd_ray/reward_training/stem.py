"""Training of a `latent_clip` reward: the stem learns to give a pixel reward's tower what it would see in the decoded image."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from flashdmd_ray.losses.reward_model import stem_loss
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards.clip import CosineReward
from flashdmd_ray.models.rewards.latent_clip import LatentClip, estimate
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.training import RewardTrainer
from flashdmd_ray.reward_training.verdicts import load_judges


class StemTrainer(RewardTrainer):
    """A stem under training on one rank. It sees the images of the pairs, noised, and no label."""

    @classmethod
    def from_config(cls, config: RewardTrainingConfig, family: Family) -> Self:
        """The judge's tower and a random stem, which depends on the seed alone. The teacher is loaded, for its estimates."""
        (judging,) = [reward for reward in config.rewards if not reward.held_out]
        judge = load_judges([judging], family.device)[judging.label]
        assert isinstance(judge, CosineReward), "the configuration refuses others"
        family.load(("denoiser",))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = LatentClip(judge, family.latent_shape, config.latent_reward.width).to(family.device)
        return cls(config, family, model)

    def loss(self, noisy: Tensor, timesteps: Tensor, texts: tuple[str, ...], labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `RewardTrainer.loss`."""
        family, model = self.family, self.engine.module
        assert isinstance(model, LatentClip)
        conditioning = family.encode(texts).repeat_interleave(2)
        both = noisy.flatten(0, 1)
        estimates = estimate(family.teacher, family.schedule, both, timesteps.repeat_interleave(2), conditioning)
        with torch.no_grad():
            targets = model.targets(family.decode(estimates).clamp(-1, 1))
        patches, embeddings = self.engine(estimates)
        cosines = (embeddings.detach() * model.judge.text_features(texts).repeat_interleave(2, 0)).sum(dim=-1)
        return stem_loss(patches, embeddings, *targets), model.judge.reward(cosines).unflatten(0, (-1, 2))
