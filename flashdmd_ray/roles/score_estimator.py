"""The score estimator mu_psi ("fake score" in DMD papers) beside the teacher mu_real: the critic of distribution matching."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Latents, Metrics, Prompts, noise
from flashdmd_ray.checkpoint import Destination, load_tensors
from flashdmd_ray.config import Config
from flashdmd_ray.diffusion.sampling import guided
from flashdmd_ray.losses.denoising import denoising_loss
from flashdmd_ray.losses.distribution_matching import distribution_matching_gradient
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.image_sampling import sample_all_images, teacher_sampler
from flashdmd_ray.roles.networks import TrainedRole, group_family, save_engine, trained_engine, x0_predictor
from flashdmd_ray.run.storage import Location


class ScoreEstimator(TrainedRole):
    """Tracks the generator's distribution: denoises its samples, and moves towards its weights after every generator update (EMA)."""

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> ScoreEstimator:
        family = group_family(config, "learner")
        return cls(config, family, trained_engine(config, family, "score", config.score, "score estimator"))

    @torch.no_grad()
    def dm_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        """Per-sample dL_DM/dx, float32 (B, C, h, w), with x renoised to timesteps int64 (B,).

        Compares the teacher with guidance and this network without.
        """
        x = fakes.values
        conditioning = self.family.encode(fakes.prompts.texts)
        noisy = self.schedule.add_noise(x, self._noise(fakes, seed), timesteps)
        teacher = x0_predictor(self.family.teacher, self.schedule, conditioning)
        blank = x0_predictor(self.family.teacher, self.schedule, self.family.unconditional(len(x)))
        x_real = guided(teacher, blank, self.config.matching.guidance_scale)(noisy, timesteps)
        x_fake = x0_predictor(self.engine.module, self.schedule, conditioning)(noisy, timesteps)
        gradient = len(x) * distribution_matching_gradient(x, x_real, x_fake, self.config.matching.epsilon)
        return gradient, {
            "matching/real_fake_gap": (x_real - x_fake).square().mean().sqrt().item(),
            "matching/real_generated_gap": (x_real - x).square().mean().sqrt().item(),
        }

    def denoising_step(self, fakes: Latents, timesteps: Tensor, seed: int, real_positions: Tensor) -> Metrics:
        """Make one denoising update on detached generator samples.

        `real_positions` serves the DMD2 form, whose GAN head is on this network.
        """
        eps = self._noise(fakes, seed)
        noisy = self.schedule.add_noise(fakes.values, eps, timesteps)
        conditioning, network_timesteps = (
            self.family.encode(fakes.prompts.texts),
            self.schedule.network_timestep(timesteps),
        )
        loss = torch.zeros((), device=self.engine.device)
        for rows in self.engine.micro_batches(len(noisy)):
            prediction = self.engine(noisy[rows], network_timesteps[rows], conditioning[rows])
            part = self._denoising_loss(prediction, fakes.values[rows], noisy[rows], eps[rows], timesteps[rows])
            loss += self.engine.backward(part)
        norm = self.engine.update("distillation")
        return {"score/loss": loss.item(), "score/grad_norm": norm, "score/lr": self.engine.rate}

    def _denoising_loss(self, prediction: Tensor, x0: Tensor, noisy: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        if self.config.score.target == "x0":
            return denoising_loss(self.schedule.to_x0(prediction, noisy, timesteps), x0)
        return denoising_loss(prediction, self.schedule.target(x0, eps, timesteps))

    def _noise(self, latents: Latents, seed: int) -> Tensor:
        return noise(latents.prompts.indices, self.family.latent_shape, seed, "diffuse")

    def ema_update_from(self, generator: Generator, decay: float) -> None:
        """Move towards the generator: psi <- decay psi + (1 - decay) theta, on the float32 masters; a decay of 1 does nothing."""
        if decay < 1:
            self.engine.ema_update_from(generator.engine, decay)

    def save(self, directory: Path | Destination) -> None:
        save_engine(directory / "score_estimator.safetensors", self.engine)

    def load(self, directory: Location) -> None:
        self.engine.load_state(load_tensors(directory / "score_estimator.safetensors"))

    @torch.no_grad()
    def generate_teacher_images(self, prompts: Prompts, steps: int, guidance_scale: float, seed: int) -> Tensor:
        """Teacher images from the noise of `Generator.generate_images`, float32 (B, 3, H, W) in [-1, 1], on the CPU."""
        self.family.load(("vae",))
        sampler = teacher_sampler(self.family, steps, guidance_scale)
        batch = self.config.evaluation.batch
        return sample_all_images(self.family, sampler, prompts.texts, prompts.indices.tolist(), seed, batch)
