"""The generator: the few-step student G_theta and its frozen reference policy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Latents, NoiseLevels, Prediction, PreferencePairs, Prompts, noise
from flashdmd_ray.checkpoint import Destination, Saved, load_tensors
from flashdmd_ray.config import Config
from flashdmd_ray.diffusion.sampling import PredictX0, backward_simulations, complete, full, transition
from flashdmd_ray.engine import Engine
from flashdmd_ray.engine.average import WeightAverage
from flashdmd_ray.losses.distribution_matching import surrogate
from flashdmd_ray.losses.preference import log_ratio_difference, preference_loss
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.drawing import draw_samples, student_sampler
from flashdmd_ray.roles.networks import (
    Metrics,
    bind,
    frozen,
    group_family,
    noise_stream,
    save_engine,
    save_shared,
    trained_engine,
)
from flashdmd_ray.run.storage import Location

AVERAGE = "generator_average.safetensors"
"""The part of a checkpoint with the average of the weights over the steps, if `evaluation.ema` asks for one."""


Inputs = tuple[tuple[Tensor, Tensor], ...]
"""(noisy latents, timesteps) of each forward with a gradient: one, or two."""


class Generator(Saved):
    """Trained by the DM gradient, the adversarial gradient and the preference loss; starts as the teacher."""

    def __init__(self, config: Config, family: Family, engine: Engine):
        self.config = config
        self.family = family
        self.schedule = family.schedule
        self.timesteps = config.sampling.timesteps
        self.engine = engine
        self.average = WeightAverage(engine, config.evaluation.ema) if config.evaluation.ema else None
        self.reference: torch.nn.Module | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._inputs: Inputs = ()
        self._conditioning: Conditioning

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Generator:
        family = group_family(config, "learner")
        return cls(config, family, trained_engine(config, family, "generator", config.generator, "generator"))

    @property
    def device(self) -> torch.device:
        """Where its networks compute."""
        return self.family.device

    def predict(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Prediction:
        """The two forwards of one update, kept for `update` (ALGORITHM 3.1, 3.2).

        coarse = G(B(t_i), t_i), from backward simulation to each sample's own step i of `levels`. fine = G(x^, t), where x^ is the clean
        sample that the same simulation ends in, noised to the fine timestep t: no gradient of one reaches the other's forward. Without
        a fine level both objectives act on the coarse forward (DMD2). Values are returned detached.

        With micro-batches no graph is kept: `update` makes the two forwards again, one micro-batch at a time.
        """
        whole = self.config.engine.accumulation == 1
        self._conditioning = self.family.encode(prompts.texts)
        predict_x0 = bind(self.engine if whole else self.engine.module, self.schedule, self._conditioning)
        with torch.set_grad_enabled(whole):
            coarse, fine, self._inputs = self._two_forwards(predict_x0, prompts, levels, seed)
        self._outputs = (coarse, fine)
        return Prediction(Latents(coarse.detach(), prompts), Latents(fine.detach(), prompts))

    @torch.no_grad()
    def sample(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Prediction:
        """As `predict`, outside autograd: fresh fakes for the further updates of a TTUR above 1."""
        predict_x0 = bind(self.engine.module, self.schedule, self.family.encode(prompts.texts))
        coarse, fine, _ = self._two_forwards(predict_x0, prompts, levels, seed)
        return Prediction(Latents(coarse, prompts), Latents(fine, prompts))

    def _two_forwards(
        self, predict_x0: PredictX0, prompts: Prompts, levels: NoiseLevels, seed: int
    ) -> tuple[Tensor, Tensor, Inputs]:
        """Coarse and fine output, and what the network was given for each."""
        shape, timesteps = self.family.latent_shape, self.timesteps
        simulate, draw_noise = frozen(predict_x0), noise_stream(prompts, shape, seed, "simulate")
        simulated = backward_simulations(simulate, self.schedule, timesteps, levels.deepest, draw_noise)
        own = levels.coarse, torch.arange(len(levels), device=levels.coarse.device)
        noisy, at_coarse = simulated[own], torch.tensor(timesteps, device=self.device)[levels.coarse]
        coarse = predict_x0(noisy, at_coarse)
        if levels.fine is None:
            return coarse, coarse, ((noisy, at_coarse),)
        x0 = simulate(simulated[-1], full(timesteps[levels.deepest], noisy))
        clean = complete(simulate, self.schedule, timesteps, levels.deepest, x0, draw_noise)
        at_fine = full(levels.fine, clean)
        noisy_fine = self.schedule.add_noise(clean, noise(prompts.indices, shape, seed, "low"), at_fine)
        return coarse, predict_x0(noisy_fine, at_fine), ((noisy, at_coarse), (noisy_fine, at_fine))

    def _again(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The two outputs of `predict` for some rows, with a graph."""
        predict_x0 = bind(self.engine, self.schedule, self._conditioning[rows])
        outputs = [predict_x0(noisy[rows], timesteps[rows]) for noisy, timesteps in self._inputs]
        return outputs[0], outputs[-1]

    def update(self, matching: Tensor, realism: Tensor) -> Metrics:
        """One backward and one optimizer step from the critics' per-sample gradients dLoss_b/dx_b, each float32 (B, C, h, w).

        The objective is their mean over the batch, so it does not matter how many ranks a critic had. One backward of
        the sum: two would lose the first gradient under ZeRO. Raises FloatingPointError when not finite.
        """
        assert self._outputs is not None, "update() without predict()"
        coarse, fine = self._outputs
        self._outputs = None
        for rows in self.engine.micro_batches(len(coarse)):
            x, y = (coarse, fine) if coarse.requires_grad else self._again(rows)
            self.engine.backward((surrogate(x, matching[rows]) + surrogate(y, realism[rows])) / len(x))
        norm = self.engine.update("distillation")
        with torch.no_grad():
            return {
                "generator/grad_norm": norm,
                "generator/latent_mean": coarse.mean().item(),
                "generator/latent_std": coarse.std().item(),
                "generator/saturation": (coarse.abs() > 3).float().mean().item(),
            }

    def prefer(self, pairs: PreferencePairs, rate: float = 1.0) -> Metrics:
        """One preference update: L = -logsigmoid(beta H), averaged over the kept pairs (ALGORITHM 4). rate: a factor of `preference.lr`."""
        assert self.reference is not None, "prefer() before freeze_reference()"
        conditioning = self.family.encode(pairs.prompts.texts)
        at = full(pairs.timestep, pairs.noisy)
        preference = self.config.preference
        loss = torch.zeros((), device=self.engine.device)
        ratios, drifts = [], []
        for rows in self.engine.micro_batches(len(pairs.noisy)):
            x0 = bind(self.engine, self.schedule, conditioning[rows])(pairs.noisy[rows], at[rows])
            with torch.no_grad():
                reference_x0 = bind(self.reference, self.schedule, conditioning[rows])(pairs.noisy[rows], at[rows])
            mean, std = transition(self.schedule, x0, pairs.next_timestep)
            reference_mean, _ = transition(self.schedule, reference_x0, pairs.next_timestep)
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
                "preference/ratio": (pairs.weights * ratio.abs().nan_to_num()).mean().item(),
                "preference/implicit_accuracy": (pairs.weights * (ratio > 0)).mean().item(),
                "preference/drift": torch.cat(drifts).square().mean().sqrt().item(),
            }

    def freeze_reference(self) -> None:
        """The reference policy G_ref: a frozen copy of the generator as it is now; of a LoRA generator, of its adapter."""
        self.reference = self.engine.copy()

    def weights(self) -> dict[str, Tensor]:
        """What training moves, full and float32, for the rollout workers: all weights, or with LoRA the adapter's."""
        return self.engine.weights()

    def take_average(self) -> None:
        """Take the weights as they are after a step into their average."""
        assert self.average is not None, "take_average() with evaluation.ema 0"
        self.average.update()

    def save(self, directory: Path | Destination) -> None:
        """Write weights, moments, the average and the reference; every rank calls, rank 0 writes."""
        save_engine(directory / "generator.safetensors", self.engine)
        if self.average is not None:
            save_shared(directory / AVERAGE, dict(self.average.state_items()))
        if self.reference is not None:
            save_shared(directory / "reference.safetensors", self.reference.state_dict())

    def load(self, directory: Location) -> None:
        """Continue from what `save` wrote. An average that was not kept until then starts from the loaded weights."""
        self.engine.load_state(load_tensors(directory / "generator.safetensors"))
        if self.config.evaluation.ema:
            self.average = WeightAverage(self.engine, self.config.evaluation.ema)
            if (directory / AVERAGE).exists():
                self.average.load_state(load_tensors(directory / AVERAGE))
        if (directory / "reference.safetensors").exists():
            self.freeze_reference()
            assert self.reference is not None
            self.reference.load_state_dict(load_tensors(directory / "reference.safetensors"))

    @torch.no_grad()
    def draw(self, prompts: Prompts, timesteps: tuple[int, ...], seed: int) -> Tensor:
        """Few-step images for people to look at, float32 (B, 3, H, W) in [-1, 1], on the CPU; noise is `drawing.SampleNoise` of seed and
        prompts.indices.

        Drawn with the average of the weights when `evaluation.ema` asks for one; training goes on from the very weights it had. Collective:
        all ranks hold equally many prompts, because forwards under ZeRO stage 3 gather.
        """
        assert self._outputs is None, "draw() between predict() and update()"
        self.family.load(("vae",))
        sampler = student_sampler("student", self.family, self.engine.module, timesteps)
        indices, batch = prompts.indices.tolist(), self.config.evaluation.batch
        with nullcontext() if self.average is None else self.average.applied():
            return draw_samples(self.family, sampler, prompts.texts, indices, seed, batch)
