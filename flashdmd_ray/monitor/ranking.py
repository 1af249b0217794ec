"""Check that latent rewards rank the candidates of a run, against a pixel reward, before anything is learnt from them.

Candidates share their x0 and differ in noise only. A latent reward that orders images well may still not tell them apart, and pairs that
it chooses are then chance.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashdmd_ray.config import Config
from flashdmd_ray.monitor.agreement import Agreement, agreement

logger = logging.getLogger(__name__)

GROUPS = 32
"""Prompt groups that are compared at each timestep, at least."""
CERTAIN = 1.96
"""Standard errors that a correlation must lie above 0."""


def judge_of(config: Config) -> str | None:
    """Label of the pixel reward that latent rewards are compared with, a held-out one first; None when there is nothing to compare."""
    pixel = [reward for reward in config.rewards if reward.reads_images]
    if not pixel or len(pixel) == len(config.rewards):
        return None
    return max(pixel, key=lambda reward: reward.held_out).label


def check(config: Config, scores: Mapping[int, Sequence[Mapping[str, Tensor]]]) -> dict[str, float]:
    """Agreement of every latent reward with the judge: metrics `ranking/<label>/<timestep>` (rank correlation) and .../best_beats_worst.

    scores: timestep of the candidates -> for each call label -> rewards float32 (B, K). Raises ValueError, one line, for an optimised
    latent reward whose correlation is above 0 with certainty at no timestep, unless its `skip_noise_check` says why.
    """
    judge = judge_of(config)
    assert judge is not None, "check() without a reward to compare with"
    metrics: dict[str, float] = {}
    for reward in config.rewards:
        if reward.reads_images:
            continue
        by_timestep = {
            timestep: agreement(*(torch.cat([call[label] for call in calls]) for label in (reward.label, judge)))
            for timestep, calls in scores.items()
        }
        found = {timestep: both for timestep, both in by_timestep.items() if both is not None}
        for timestep, both in found.items():
            metrics[f"ranking/{reward.label}/{timestep}"] = both.correlation
            metrics[f"ranking/{reward.label}/{timestep}/best_beats_worst"] = both.best_beats_worst
        ranks = any(both.correlation > CERTAIN * both.error for both in found.values())
        if found and not ranks and not reward.held_out and reward.skip_noise_check is None:
            raise ValueError(
                f"rewards: '{reward.label}' ({reward.kind}, {reward.path}) cannot rank the candidates of this run: "
                f"{in_words(found, judge)}. Pairs chosen by it would be chance: train one on candidates (docs/latent_rewards.md), hold it "
                "out, or say in its setting `skip_noise_check` why that is right"
            )
    return metrics


def in_words(found: Mapping[int, Agreement], judge: str) -> str:
    """rank correlation with 'pickscore' .31 +- .06 at t = 749, ..."""
    parts = [f"{both.correlation:.2f} +- {CERTAIN * both.error:.2f} at t = {t}" for t, both in found.items()]
    return f"rank correlation with '{judge}' {' and '.join(parts)}"


def summary(metrics: Mapping[str, float]) -> list[str]:
    """Lines for the terminal from the metrics of the step at which rewards were checked; none at other steps."""
    lines = []
    for name, value in metrics.items():
        _, _, rest = name.partition("ranking/")
        label, _, timestep = rest.rpartition("/")
        if rest and timestep.isdigit():
            wins = metrics[f"{name}/best_beats_worst"]
            lines.append(
                f"latent reward '{label}' on candidates at t = {timestep}: rank correlation {value:.2f} with the pixel reward, its best "
                f"beats its worst in {wins:.0%} of the groups"
            )
    return lines
