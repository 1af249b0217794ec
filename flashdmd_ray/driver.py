"""Algorithm 1 of Flash-DMD: timestep-aware distillation, and latent preference RL beside it.

Every call below goes to a role (flashdmd_ray/roles) and runs on all ranks of its worker group. The driver makes every discrete choice
and hands out seeds, so the loop reads the same on one process and on a cluster. docs/algorithm.md maps each equation to its function and
lists what deviates from the paper's Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from flashdmd_ray.batch import Fakes, Metrics, NoiseLevels, Prompts, StepRng
from flashdmd_ray.config import Config
from flashdmd_ray.data import ImageSource
from flashdmd_ray.losses.adversarial import balanced_weight
from flashdmd_ray.preferences import PreferenceSource
from flashdmd_ray.runtime.protocol import Runtime


class Run(Protocol):
    """The side effects of the loop: which steps to do, and what to keep of each."""

    @property
    def preference_rate(self) -> float:
        """Factor of the learning rate of preference updates: 1, or less after the hack monitor lowered it."""

    def steps(self) -> Iterable[int]:
        """Steps to do: from the one after the last checkpoint, until done or interrupted."""

    def finish(self, step: int, metrics: Metrics) -> None:
        """Record metrics; write sample grids and the checkpoint of every role when due."""


def train(config: Config, runtime: Runtime, data: ImageSource, run: Run) -> None:
    """Interleave distillation and preference updates until the run's steps are done."""
    preferences = PreferenceSource(config, runtime, partial(next_prompts, data))
    for step in run.steps():
        runtime.step = step
        rng = StepRng(config.seed, step)
        if config.preference.updates and step == config.preference.start_step:
            runtime.generator.freeze_reference()
        preferences.publish(step)
        requests = preferences.request(rng)  # the preference pairs of this step, made while we distil
        ranking_requests = preferences.request_ranking(rng)

        distillation_metrics = distil(config, runtime, data, rng) if config.preference.distill else {}

        ranking = preferences.check_ranking(ranking_requests)  # before anything is learnt from the rewards
        preference_metrics, updates = [], 0
        for rated in preferences.collect(requests):
            preference_metrics.append(rated.metrics)
            if rated.pairs is not None:
                preference_metrics.append(runtime.generator.preference_step(rated.pairs, run.preference_rate))
                updates += 1
        if config.evaluation.ema:
            runtime.generator.update_ema()
        counts = preferences.group_counts() | runtime.pool_metrics() | {"preference/updates": float(updates)}
        run.finish(step, distillation_metrics | average(preference_metrics) | ranking | counts)


def distil(config: Config, runtime: Runtime, data: ImageSource, rng: StepRng) -> Metrics:
    """One generator update, then `ttur` updates of the score estimator and the discriminator."""
    generator, score, discriminator = runtime.generator, runtime.score, runtime.discriminator
    dm_timesteps = rng.timesteps("matching", config.batch, *inclusive(config.matching.timestep_range))
    gan_timesteps = rng.timesteps("realism", config.batch, 0, 1000)  # read by DMD2's latent discriminator only

    # x at high noise for distribution matching, y at low noise for the GAN; their graphs are kept for distillation_step.
    fakes = generator.generate(*generator_inputs(config, data, rng, "predict"))
    (dm_grad, dm_metrics), (gan_grad, gan_metrics) = runtime.parallel(
        lambda: score.dm_gradient(fakes.high_noise, dm_timesteps, rng.seed("matching")),
        lambda: discriminator.gan_gradient(fakes.low_noise, gan_timesteps, rng.seed("realism")),
    )
    weight = gan_weight(config, dm_grad, gan_grad)

    def update_learner() -> Metrics:
        generator_metrics = generator.distillation_step(dm_grad, weight * gan_grad)
        score.ema_update_from(generator, config.score.ema)
        return generator_metrics | score.denoising_step(fakes.high_noise, *score_inputs(config, rng, 0))

    # The critics' first update learns from the forwards already made, as in GAN training; a TTUR above 1 samples afresh.
    learner_metrics, discriminator_metrics = runtime.parallel(
        update_learner, lambda: discriminator.step(fakes.low_noise, real_positions(config, rng, 0))
    )
    for update in range(1, config.ttur):
        fresh = generator.sample_fakes(*generator_inputs(config, data, rng, f"critics/{update}"))
        update_critics(config, runtime, rng, fresh, update)
    return (
        dm_metrics | gan_metrics | learner_metrics | discriminator_metrics | gradient_norms(dm_grad, gan_grad, weight)
    )


def update_critics(config: Config, runtime: Runtime, rng: StepRng, fakes: Fakes, update: int) -> None:
    """One update of the score estimator and of the discriminator, at the same time."""
    runtime.parallel(
        lambda: runtime.score.denoising_step(fakes.high_noise, *score_inputs(config, rng, update)),
        lambda: runtime.discriminator.step(fakes.low_noise, real_positions(config, rng, update)),
    )


def generator_inputs(config: Config, data: ImageSource, rng: StepRng, stream: str) -> tuple[Prompts, NoiseLevels, int]:
    """Arguments of the generator's two forwards: prompts, noise levels and the seed of its noise."""
    prompts = next_prompts(data, rng, stream, config.batch)
    return prompts, sample_noise_levels(config, rng, stream), rng.seed(stream)


def next_prompts(data: ImageSource, rng: StepRng, stream: str, count: int) -> Prompts:
    """The prompts of this step in `stream`: each once per epoch. A position in the data is a function of the step."""
    rows = torch.arange(count)
    return Prompts(data.prompts(stream, rng.step * count + rows), rows)


def sample_noise_levels(config: Config, rng: StepRng, stream: str) -> NoiseLevels:
    """Choose each sample's denoising step for distribution matching, and the timestep of the GAN's forward.

    Timestep-aware: any but the last step for distribution matching, the last timestep for the GAN. Shared (DMD2), or a one-step
    generator: any step for both.
    """
    timesteps = config.sampling.timesteps
    split = config.matching.timestep_split == "timestep_aware" and len(timesteps) > 1
    steps = len(timesteps) - 1 if split else len(timesteps)
    high_noise = rng.timesteps(f"{stream}/coarse", config.batch, 0, steps)
    if config.matching.timestep_per == "batch":
        high_noise = high_noise[:1].expand(config.batch)
    return NoiseLevels(high_noise, int(high_noise.max()), timesteps[-1] if split else None)


def score_inputs(config: Config, rng: StepRng, update: int) -> tuple[Tensor, int, Tensor]:
    """Arguments of one denoising update of the score estimator: timesteps int64 (batch,), noise seed, positions of real images."""
    stream = f"critics/{update}/score"
    timesteps = rng.timesteps(stream, config.batch, *inclusive(config.score.timestep_range))
    return timesteps, rng.seed(stream), real_positions(config, rng, update)


def real_positions(config: Config, rng: StepRng, update: int) -> Tensor:
    """Positions of the real images of one critic update, int64 (batch,)."""
    return (rng.step * config.ttur + update) * config.batch + torch.arange(config.batch)


def inclusive(timestep_range: tuple[int, int]) -> tuple[int, int]:
    """The configuration's [lowest, highest] as the half-open range of a draw."""
    low, high = timestep_range
    return low, high + 1


def gan_weight(config: Config, dm_grad: Tensor, gan_grad: Tensor) -> float:
    """lambda of this update: as configured, or what brings the GAN gradient to `balance` times the DM gradient."""
    adversarial = config.adversarial
    if adversarial.balance is None:
        return adversarial.weight
    return adversarial.weight * balanced_weight(dm_grad.norm().item(), gan_grad.norm().item(), adversarial.balance)


def gradient_norms(dm_grad: Tensor, gan_grad: Tensor, weight: float) -> Metrics:
    """Norms of both gradients with respect to the latents, and lambda."""
    return {
        "matching/gradient_norm": dm_grad.norm().item(),
        "adversarial/gradient_norm": gan_grad.norm().item(),
        "adversarial/weight": weight,
    }


def average(records: list[Metrics]) -> Metrics:
    """Mean of every metric over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: sum(r[name] for r in records if name in r) / sum(name in r for r in records) for name in names}
