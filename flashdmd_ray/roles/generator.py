"""The generator: the few-step student G_theta and its frozen reference policy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Fakes, Latents, Metrics, NoiseLevels, PreferencePairs, Prompts, noise
from flashdmd_ray.checkpoint import Destination, load_tensors
from flashdmd_ray.config import Config
from flashdmd_ray.diffusion.sampling import (
    PredictX0,
    backward_simulations,
    denoise_to_clean,
    step_distribution,
    timesteps_like,
)
from flashdmd_ray.engine import Engine
from flashdmd_ray.engine.ema import EMA
from flashdmd_ray.losses.distribution_matching import surrogate
from flashdmd_ray.losses.preference import log_ratio_difference, preference_loss
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.image_sampling import sample_all_images, student_sampler
from flashdmd_ray.roles.networks import (
    TrainedRole,
    group_family,
    prompt_noise,
    save_engine,
    save_shared,
    trained_engine,
    without_grad,
    x0_predictor,
)
from flashdmd_ray.run.storage import Location

AVERAGE = "generator_average.safetensors"
"""The part of a checkpoint with the average of the weights over the steps, if `evaluation.ema` asks for one."""


Inputs = tuple[tuple[Tensor, Tensor], ...]
"""(noisy latents, timesteps) of each forward with a gradient: one, or two."""


class Generator(TrainedRole):
    """Trained by the DM gradient, the adversarial gradient and the preference loss; starts as the teacher."""

    def __init__(self, config: Config, family: Family, engine: Engine):
        super().__init__(config, family, engine)
        self.timesteps = config.sampling.timesteps
        self.average = EMA(engine, config.evaluation.ema) if config.evaluation.ema else None
        self.reference: torch.nn.Module | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._inputs: Inputs = ()
        self._conditioning: Conditioning

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Generator:
        family = group_family(config, "learner")
        return cls(config, family, trained_engine(config, family, "generator", config.generator, "generator"))

    def generate(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Fakes:
        """Generate x and y of one update and keep their graphs for `distillation_step`.

            x = G(B(t_i), t_i)        high noise: backward simulation B to each sample's own denoising step i of `levels`
            y = G(noise(x0, t), t)    low noise: x0 is the clean sample that the same simulation ends in

        No gradient of one reaches the other's forward. Without a low-noise level both losses act on x (DMD2). Values are returned
        detached. With micro-batches no graph is kept: `distillation_step` makes the two forwards again, one micro-batch at a time.
        """
        whole = self.config.engine.micro_batches == 1
        self._conditioning = self.family.encode(prompts.texts)
        predict_x0 = x0_predictor(self.engine if whole else self.engine.module, self.schedule, self._conditioning)
        with torch.set_grad_enabled(whole):
            x, y, self._inputs = self._two_forwards(predict_x0, prompts, levels, seed)
        self._outputs = (x, y)
        return Fakes(Latents(x.detach(), prompts), Latents(y.detach(), prompts))

    @torch.no_grad()
    def sample_fakes(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Fakes:
        """Generate x and y outside autograd: fresh fakes for the further critic updates of a TTUR above 1."""
        predict_x0 = x0_predictor(self.engine.module, self.schedule, self.family.encode(prompts.texts))
        x, y, _ = self._two_forwards(predict_x0, prompts, levels, seed)
        return Fakes(Latents(x, prompts), Latents(y, prompts))

    def _two_forwards(
        self, predict_x0: PredictX0, prompts: Prompts, levels: NoiseLevels, seed: int
    ) -> tuple[Tensor, Tensor, Inputs]:
        """Return x, y and the network's inputs of each."""
        shape, timesteps = self.family.latent_shape, self.timesteps
        simulate, noise_sampler = without_grad(predict_x0), prompt_noise(prompts, shape, seed, "simulate")
        simulated = backward_simulations(simulate, self.schedule, timesteps, levels.max_step, noise_sampler)
        own = levels.high_noise, torch.arange(len(levels), device=levels.high_noise.device)
        noisy, high_timesteps = simulated[own], torch.tensor(timesteps, device=self.device)[levels.high_noise]
        x = predict_x0(noisy, high_timesteps)
        if levels.low_noise is None:
            return x, x, ((noisy, high_timesteps),)
        x0 = simulate(simulated[-1], timesteps_like(timesteps[levels.max_step], noisy))
        clean = denoise_to_clean(simulate, self.schedule, timesteps, levels.max_step, x0, noise_sampler)
        low_timesteps = timesteps_like(levels.low_noise, clean)
        noisy_low = self.schedule.add_noise(clean, noise(prompts.indices, shape, seed, "low"), low_timesteps)
        return x, predict_x0(noisy_low, low_timesteps), ((noisy, high_timesteps), (noisy_low, low_timesteps))

    def _again(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Make the two outputs of `generate` again for some rows, with a graph."""
        predict_x0 = x0_predictor(self.engine, self.schedule, self._conditioning[rows])
        outputs = [predict_x0(noisy[rows], timesteps[rows]) for noisy, timesteps in self._inputs]
        return outputs[0], outputs[-1]

    def distillation_step(self, dm_grad: Tensor, gan_grad: Tensor) -> Metrics:
        """Update the generator by the critics' per-sample gradients dLoss_b/dx_b and dLoss_b/dy_b, each float32 (B, C, h, w).

        The loss is their mean over the batch, so it does not matter how many ranks a critic had. One backward of the sum: two would
        lose the first gradient under ZeRO. Raises FloatingPointError when not finite.
        """
        assert self._outputs is not None, "distillation_step() without generate()"
        x, y = self._outputs
        self._outputs = None
        for rows in self.engine.micro_batches(len(x)):
            part_x, part_y = (x, y) if x.requires_grad else self._again(rows)
            loss = (surrogate(part_x, dm_grad[rows]) + surrogate(part_y, gan_grad[rows])) / len(part_x)
            self.engine.backward(loss)
        norm = self.engine.update("distillation")
        with torch.no_grad():
            return {
                "generator/grad_norm": norm,
                "generator/lr": self.engine.rate,
                "generator/latent_mean": x.mean().item(),
                "generator/latent_std": x.std().item(),
                "generator/saturation": (x.abs() > 3).float().mean().item(),
            }

    def preference_step(self, pairs: PreferencePairs, rate: float = 1.0) -> Metrics:
        """Make one preference update: L = -logsigmoid(beta H), averaged over the kept pairs. rate: a factor of `preference.lr`."""
        assert self.reference is not None, "preference_step() before freeze_reference()"
        conditioning = self.family.encode(pairs.prompts.texts)
        at = timesteps_like(pairs.timestep, pairs.noisy)
        preference = self.config.preference
        loss = torch.zeros((), device=self.engine.device)
        ratios, drifts = [], []
        for rows in self.engine.micro_batches(len(pairs.noisy)):
            x0 = x0_predictor(self.engine, self.schedule, conditioning[rows])(pairs.noisy[rows], at[rows])
            with torch.no_grad():
                reference_x0 = x0_predictor(self.reference, self.schedule, conditioning[rows])(
                    pairs.noisy[rows], at[rows]
                )
            mean, std = step_distribution(self.schedule, x0, pairs.next_timestep)
            reference_mean, _ = step_distribution(self.schedule, reference_x0, pairs.next_timestep)
            part = log_ratio_difference(mean, reference_mean, pairs.winners[rows], pairs.losers[rows], std)
            loss += self.engine.backward(preference_loss(part, preference.beta, pairs.weights[rows]))
            ratios.append(part.detach())
            drifts.append((mean - reference_mean).detach())
        norm = self.engine.update("preference", preference.model_copy(update={"lr": rate * preference.lr}))
        with torch.no_grad():
            ratio = torch.cat(ratios)
            # Weighted means: over all ranks together they are the means over the kept pairs, wherever those are.
            return {
                "preference/loss": loss.item(),
                "preference/grad_norm": norm,
                "preference/lr": self.engine.rate,
                "preference/beta_h": preference.beta * (pairs.weights * ratio.abs().nan_to_num()).mean().item(),
                "preference/implicit_accuracy": (pairs.weights * (ratio > 0)).mean().item(),
                "preference/drift": torch.cat(drifts).square().mean().sqrt().item(),
            }

    def freeze_reference(self) -> None:
        """Freeze a copy of the generator as it is now as the reference policy G_ref; of a LoRA generator, its adapter."""
        self.reference = self.engine.copy()

    def live_weights(self) -> dict[str, Tensor]:
        """Trained weights for the rollout workers: all, or with LoRA the adapter's. The next update changes them."""
        return self.engine.live_weights()

    def weights(self) -> dict[str, Tensor]:
        """A copy of `live_weights`."""
        return {name: tensor.clone() for name, tensor in self.live_weights().items()}

    def update_ema(self) -> None:
        """Take the weights as they are after a step into their moving average."""
        assert self.average is not None, "update_ema() with evaluation.ema 0"
        self.average.update()

    def save(self, directory: Path | Destination) -> None:
        """Write weights, moments, the average and the reference; every rank calls, rank 0 writes."""
        save_engine(directory / "generator.safetensors", self.engine)
        if self.average is not None:
            save_shared(directory / AVERAGE, dict(self.average.state_items()))
        if self.reference is not None:
            save_shared(directory / "reference.safetensors", self.reference.state_dict())

    def load(self, directory: Location) -> None:
        """Continue from what `save` wrote, whatever came since. An average that was not kept until then starts from the loaded weights."""
        self._outputs = None
        self.engine.load_state(load_tensors(directory / "generator.safetensors"))
        if self.config.evaluation.ema:
            self.average = EMA(self.engine, self.config.evaluation.ema)
            if (directory / AVERAGE).exists():
                self.average.load_state(load_tensors(directory / AVERAGE))
        if (directory / "reference.safetensors").exists():
            self.freeze_reference()
            assert self.reference is not None
            self.reference.load_state_dict(load_tensors(directory / "reference.safetensors"))
        else:
            self.reference = None

    @torch.no_grad()
    def generate_images(self, prompts: Prompts, timesteps: tuple[int, ...], seed: int) -> Tensor:
        """Few-step images for people to look at, float32 (B, 3, H, W) in [-1, 1], on the CPU.

        The noise is `image_sampling.SampleNoise` of seed and prompts.indices. Uses the average of the weights when `evaluation.ema` asks
        for one; training goes on from the weights it had. Collective: all ranks hold equally many prompts, because forwards under ZeRO
        stage 3 gather.
        """
        assert self._outputs is None, "generate_images() between generate() and distillation_step()"
        self.family.load(("vae",))
        sampler = student_sampler("student", self.family, self.engine.module, timesteps)
        indices, batch = prompts.indices.tolist(), self.config.evaluation.batch
        with nullcontext() if self.average is None else self.average.applied():
            return sample_all_images(self.family, sampler, prompts.texts, indices, seed, batch)
