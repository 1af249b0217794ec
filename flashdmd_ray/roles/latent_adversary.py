"""DMD2's adversary (arXiv 2405.14867): a small head on the score estimator's mid block, in latent space.

The head and the score estimator are one network with one optimizer, so the two roles of the baseline share one object: the estimator
trains both losses in its update, and `LatentDiscriminator` answers the generator from it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flashdmd_ray.batch import Latents, Metrics, noise
from flashdmd_ray.checkpoint import Destination, Saved
from flashdmd_ray.config import Config
from flashdmd_ray.data import ImageSource, open_reals
from flashdmd_ray.engine import build_engine
from flashdmd_ray.losses.adversarial import discriminator_loss, generator_loss, halves
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.roles.networks import group_family, trained_network
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from flashdmd_ray.run.storage import Location


class DenoiserWithHead(nn.Module):
    """A denoiser that also judges: `logits` reads the mid block's features."""

    def __init__(self, denoiser: Denoiser, width: int, hidden: int):
        super().__init__()
        self.denoiser = denoiser
        self.head = nn.Sequential(
            nn.Conv2d(width, hidden, 3, padding=1),
            nn.GroupNorm(4, hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, 1, 3, padding=1),
        )

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        gan_inputs: tuple[Tensor, Tensor, Conditioning] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction; with `gan_inputs` (noisy latents, timesteps, conditioning) also their logits, from one call of the engine."""
        prediction = self.denoiser(noisy, timesteps, conditioning)
        return prediction if gan_inputs is None else (prediction, self.logits(*gan_inputs))

    def logits(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """float32 (B, N): one logit per position of the mid block."""
        features = self.denoiser.mid_features(noisy, timesteps, conditioning)
        precision = next(self.head.parameters()).dtype
        return self.head(features.to(precision)).float().flatten(1)


class AdversarialScoreEstimator(ScoreEstimator):
    """The score estimator of DMD2: denoising loss + score_weight * GAN loss in every update."""

    images: ImageSource

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> AdversarialScoreEstimator:
        family = group_family(config, "learner")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            denoiser = trained_network(config, family, "score")
            network = DenoiserWithHead(denoiser, family.mid_width, config.adversarial.hidden).to(family.device)
        estimator = cls(config, family, build_engine(config.engine, network, config.score, role="score estimator"))
        estimator.images = open_reals(config, family)
        return estimator

    def denoising_step(self, fakes: Latents, timesteps: Tensor, seed: int, real_positions: Tensor) -> Metrics:
        eps = self._noise(fakes, seed)
        noisy = self.schedule.add_noise(fakes.values, eps, timesteps)
        conditioning = self.family.encode(fakes.prompts.texts)
        reals = self.images.latents(real_positions, self.family.image_size, self.family.encode_images)
        noisy_reals = self.schedule.add_noise(
            reals.values.to(self.device),
            noise(fakes.prompts.indices, self.family.latent_shape, seed, "real"),
            timesteps,
        )
        network_timesteps = self.schedule.network_timestep(timesteps)
        real_conditioning = self.family.encode(reals.captions)
        losses, logit_pairs = torch.zeros(2, device=self.engine.device), []
        for rows in self.engine.micro_batches(len(noisy)):
            gan_inputs = (
                torch.cat([noisy_reals[rows], noisy[rows]]),
                network_timesteps[rows].repeat(2),
                Conditioning.concat([real_conditioning[rows], conditioning[rows]]),
            )
            prediction, logits = self.engine(noisy[rows], network_timesteps[rows], conditioning[rows], gan_inputs)
            denoising = self._denoising_loss(prediction, fakes.values[rows], noisy[rows], eps[rows], timesteps[rows])
            adversarial = discriminator_loss(*halves(logits), self.config.adversarial.loss)
            self.engine.backward(denoising + self.config.adversarial.score_weight * adversarial)
            losses += torch.stack([denoising, adversarial]).detach() * (len(prediction) / len(noisy))
            logit_pairs.append(torch.stack(halves(logits)).detach())
        norm = self.engine.update("distillation")
        real_logits, fake_logits = torch.cat(logit_pairs, dim=1)
        return {
            "score/loss": losses[0].item(),
            "score/grad_norm": norm,
            "score/lr": self.engine.rate,
            "discriminator/loss": losses[1].item(),
            "discriminator/accuracy_real": (real_logits > 0).float().mean().item(),
            "discriminator/accuracy_fake": (fake_logits < 0).float().mean().item(),
            "data/replaced": reals.replaced / len(reals.captions),
        }


class LatentDiscriminator(Saved):
    """The discriminator's verbs for DMD2. It owns no weights: its head trains and is saved with the score estimator."""

    def __init__(self, estimator: AdversarialScoreEstimator):
        self.estimator = estimator

    neighbour = "score"
    """The role that is built before it in its process."""

    @classmethod
    def from_neighbour(cls, estimator: AdversarialScoreEstimator) -> LatentDiscriminator:
        """The discriminator of the head on that estimator."""
        return cls(estimator)

    @property
    def device(self) -> torch.device:
        """Device of its networks."""
        return self.estimator.device

    def gan_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        """Per-sample dL_adv/dlatents, float32 (B, C, h, w), from latents renoised to `timesteps`, int64 (B,)."""
        estimator = self.estimator
        eps = noise(fakes.prompts.indices, estimator.family.latent_shape, seed, "judge")
        conditioning, at = estimator.family.encode(fakes.prompts.texts), estimator.schedule.network_timestep(timesteps)
        network, losses = estimator.engine.module, []
        gradients: list[Tensor] = []
        assert isinstance(network, DenoiserWithHead)
        for rows in estimator.engine.cut(len(fakes.values)):
            latents = fakes.values[rows].detach().requires_grad_()
            noisy = estimator.schedule.add_noise(latents, eps[rows], timesteps[rows])
            logits = network.logits(noisy, at[rows], conditioning[rows])
            loss = len(latents) * generator_loss(logits, estimator.config.adversarial.loss)
            gradients += torch.autograd.grad(loss, latents)
            losses.append(loss.item())
        return torch.cat(gradients), {"adversarial/generator_loss": sum(losses) / len(fakes.values)}

    def step(self, fakes: Latents, real_positions: Tensor) -> Metrics:
        """Nothing to do: the estimator's own update trains the head."""
        return {}

    def data_report(self) -> tuple[str, ...]:
        """See `Discriminator.data_report`."""
        return self.estimator.images.report().pairs()

    def save(self, directory: Path | Destination) -> None:
        """Saved with the score estimator."""

    def load(self, directory: Location) -> None:
        """Loaded with the score estimator."""
