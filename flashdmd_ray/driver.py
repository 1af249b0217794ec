"""Algorithm 1 of Flash-DMD: timestep-aware distillation, and latent preference RL beside it.

Every verb below belongs to a role (flashdmd_ray/roles) and runs on all ranks of its worker group; the driver draws every discrete choice
and hands out seeds, so the loop reads the same on one process and on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from flashdmd_ray.batch import Draws, NoiseLevels, Prediction, Prompts
from flashdmd_ray.config import Config
from flashdmd_ray.data import ImageSource
from flashdmd_ray.losses.adversarial import balanced_weight
from flashdmd_ray.preferences import PreferenceSource
from flashdmd_ray.roles.networks import Metrics
from flashdmd_ray.runtime.protocol import Runtime


class Run(Protocol):
    """What the loop reports to."""

    @property
    def preference_rate(self) -> float:
        """What the learning rate of preference updates is multiplied with: 1, or less after the hack monitor lowered it."""

    def steps(self) -> Iterable[int]:
        """The steps to do: from the one after the last checkpoint, until done or interrupted."""

    def finish(self, step: int, metrics: Metrics) -> None:
        """Metrics, sample grids and the checkpoint of every role, when due."""


def train(config: Config, runtime: Runtime, data: ImageSource, run: Run) -> None:
    """Interleave distillation and preference updates until the run's steps are done."""
    source = PreferenceSource(config, runtime, lambda *which: next_prompts(data, *which))
    for step in run.steps():
        runtime.step = step
        draw = Draws(config.seed, step)
        if config.preference.updates and step == config.preference.start_step:
            runtime.generator.freeze_reference()
        source.publish(step)
        requested = source.request(draw)  # the preference pairs of this step, prepared while we distil

        metrics = distil(config, runtime, data, draw) if config.preference.distill else {}

        rated, updates = [], 0
        for answer in source.collect(requested):
            rated.append(answer.metrics)
            if answer.pairs is not None:
                rated.append(runtime.generator.prefer(answer.pairs, run.preference_rate))
                updates += 1
        if config.evaluation.ema:
            runtime.generator.take_average()
        counted = source.counted() | runtime.pool_metrics() | {"preference/updates": updates}
        run.finish(step, metrics | average(rated) | counted)


def distil(config: Config, runtime: Runtime, data: ImageSource, draw: Draws) -> Metrics:
    """One generator update and `ttur` updates of the score estimator and the discriminator (ALGORITHM 3)."""
    generator, score, discriminator = runtime.generator, runtime.score, runtime.discriminator
    count = config.batch

    def update_generator() -> Metrics:
        moved = generator.update(matching, weight * realism)
        score.couple(generator, config.score.ema)
        return moved

    def update_score(fakes: Prediction, update: int) -> Metrics:
        purpose = f"critics/{update}/score"
        timesteps = draw.timesteps(purpose, count, *inclusive(config.score.timestep_range))
        return score.update(fakes.coarse, timesteps, draw.seed(purpose), next_reals(config, draw, update))

    def update_discriminator(fakes: Prediction, update: int) -> Metrics:
        return discriminator.update(fakes.fine, next_reals(config, draw, update))

    prediction = generator.predict(
        next_prompts(data, draw, "predict", count), draw_noise_levels(config, draw, "predict"), draw.seed("predict")
    )
    matching_timesteps = draw.timesteps("matching", count, *inclusive(config.matching.timestep_range))
    (matching, gaps), (realism, judged) = runtime.parallel(
        lambda: score.gradient(prediction.coarse, matching_timesteps, draw.seed("matching")),
        lambda: discriminator.gradient(
            prediction.fine, draw.timesteps("realism", count, 0, 1000), draw.seed("realism")
        ),
    )
    weight = adversarial_weight(config, matching, realism)

    # The first update of the critics learns from the forwards already made, as in GAN training; a TTUR above 1 samples afresh.
    moved, told_apart = runtime.parallel(
        lambda: update_generator() | update_score(prediction, 0),
        lambda: update_discriminator(prediction, 0),
    )
    for update in range(1, config.ttur):
        purpose = f"critics/{update}"
        fakes = generator.sample(
            next_prompts(data, draw, purpose, count), draw_noise_levels(config, draw, purpose), draw.seed(purpose)
        )
        runtime.parallel(lambda: update_score(fakes, update), lambda: update_discriminator(fakes, update))  # noqa: B023
    return gaps | judged | moved | told_apart | gradient_norms(matching, realism, weight)


def next_prompts(data: ImageSource, draw: Draws, purpose: str, count: int) -> Prompts:
    """The prompts of this step for `purpose`: each once per epoch. A position in the data is a function of the step."""
    rows = torch.arange(count)
    return Prompts(data.prompts(purpose, draw.step * count + rows), rows)


def next_reals(config: Config, draw: Draws, update: int) -> Tensor:
    """Positions of the real images of one critic update, int64 (batch,)."""
    return (draw.step * config.ttur + update) * config.batch + torch.arange(config.batch)


def draw_noise_levels(config: Config, draw: Draws, purpose: str) -> NoiseLevels:
    """Each sample's step of the coarse forward and the timestep of the fine one.

    Timestep-aware: any but the last step for distribution matching, the last timestep for the GAN. Shared (DMD2), or a one-step
    generator: any step for both.
    """
    timesteps = config.sampling.timesteps
    apart = config.matching.routing == "timestep_aware" and len(timesteps) > 1
    count = len(timesteps) - 1 if apart else len(timesteps)
    drawn = draw.timesteps(f"{purpose}/coarse", config.batch, 0, count)
    coarse = drawn if config.matching.levels == "sample" else drawn[:1].expand(config.batch)
    return NoiseLevels(coarse, int(coarse.max()), timesteps[-1] if apart else None)


def inclusive(timestep_range: tuple[int, int]) -> tuple[int, int]:
    """The configuration's [lowest, highest] as the half-open range of a draw."""
    low, high = timestep_range
    return low, high + 1


def adversarial_weight(config: Config, matching: Tensor, realism: Tensor) -> float:
    """lambda of this update: as configured, or what brings the adversarial gradient to `balance` times the DM gradient."""
    adversarial = config.adversarial
    if adversarial.balance is None:
        return adversarial.weight
    return adversarial.weight * balanced_weight(matching.norm().item(), realism.norm().item(), adversarial.balance)


def gradient_norms(matching: Tensor, realism: Tensor, weight: float) -> Metrics:
    """What each objective asks of the latents."""
    return {
        "matching/gradient_norm": matching.norm().item(),
        "adversarial/gradient_norm": realism.norm().item(),
        "adversarial/weight": weight,
    }


def average(records: list[Metrics]) -> Metrics:
    """Mean of every metric over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: sum(r[name] for r in records if name in r) / sum(name in r for r in records) for name in names}
