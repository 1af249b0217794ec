"""Scores of one preference update's candidates from every reward pool. A missing score is named, never made up."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.runtime.errors import Closed, DeadlineExceeded, RoleFailed, TensorsLost, WorkerError
from flashdmd_ray.runtime.protocol import Runtime

if TYPE_CHECKING:
    from flashdmd_ray.roles.reward import Reward

logger = logging.getLogger(__name__)

REASONS = ("deadline", "lost", "error", "not_finite")
"""Reasons why a group has no reward: the call took too long, its worker was gone, the reward raised, or its value is not finite."""


@dataclass(frozen=True)
class Scores:
    """Rewards of candidates and the reasons of those that are missing.

    rewards: label -> float32 (B, K), nan where there is none. failures: label -> for each group the reason, "" where it has a reward.
    """

    rewards: Mapping[str, Tensor]
    failures: Mapping[str, tuple[str, ...]]


def score(candidates: Candidates, config: Config, runtime: Runtime, pools: Collection[str] | None = None) -> Scores:
    """Score the candidates with all of `pools` at once (None: every pool), each in calls of `placement.<pool>.groups_per_call` groups."""
    names = [name for name in config.reward_pools if pools is None or name in pools]
    chunks = {name: _chunks(candidates, config, name) for name in names}
    calls = [
        partial(_score_chunk, runtime.rewards[name], config.reward_pools[name], config.preference.candidates, chunk)
        for name, parts in chunks.items()
        for chunk in parts
    ]
    results = iter(runtime.parallel(*calls))
    merged = [_merge([next(results) for _ in parts]) for parts in chunks.values()]
    return Scores(
        {label: rewards for pool in merged for label, rewards in pool.rewards.items()},
        {label: reasons for pool in merged for label, reasons in pool.failures.items()},
    )


def _chunks(candidates: Candidates, config: Config, pool: str) -> list[Candidates]:
    """Cut the candidates into calls. The cut follows from the configuration alone, so results do not depend on the number of workers."""
    if not any(reward.reads_images for reward in config.reward_pools[pool]):
        candidates = replace(candidates, images=torch.empty((len(candidates), 0, 3, 1, 1), dtype=torch.uint8))
    return candidates.split(config.placement.chunks(pool, len(candidates)))


def _score_chunk(pool: Reward, rewards: tuple[RewardConfig, ...], count: int, chunk: Candidates) -> Scores:
    """Score one chunk with a pool. An error that survived the pool's replays costs the chunk's groups, not the run."""
    groups = len(chunk)
    labels = [reward.label for reward in rewards]
    try:
        scores = pool.score(chunk)
        if wrong := [label for label in labels if scores[label].shape != (groups, count)]:
            raise ValueError(f"{wrong[0]} answered {tuple(scores[wrong[0]].shape)} for {groups} groups of {count}")
    except (Closed, TensorsLost):
        raise
    except Exception as error:
        logger.warning(
            "step %d: %d groups without %s: %s",
            chunk.version,
            groups,
            ", ".join(labels),
            one_line(error),
        )
        nothing = torch.full((groups, count), torch.nan)
        return Scores(dict.fromkeys(labels, nothing), dict.fromkeys(labels, (_reason(error),) * groups))
    finite = {label: scores[label].isfinite().all(dim=1).tolist() for label in labels}
    return Scores(
        {label: scores[label] for label in labels},
        {label: tuple("" if one else "not_finite" for one in finite[label]) for label in labels},
    )


def _reason(error: Exception) -> str:
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    return "lost" if isinstance(error, WorkerError) and not isinstance(error, RoleFailed) else "error"


def _merge(parts: list[Scores]) -> Scores:
    return Scores(
        {label: torch.cat([part.rewards[label] for part in parts]) for label in parts[0].rewards},
        {label: sum((part.failures[label] for part in parts), ()) for label in parts[0].failures},
    )
