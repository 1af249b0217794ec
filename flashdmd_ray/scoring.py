"""Asks every pool of rewards about one preference update's candidates. What cannot be scored is named, never made up."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.runtime.errors import DeadlineExceeded, PoolClosed, RoleFailed, WorkerError
from flashdmd_ray.runtime.protocol import Runtime

logger = logging.getLogger(__name__)

REASONS = ("deadline", "lost", "error", "not_finite")
"""Why a group has no reward: the call took too long, its worker was gone, the reward raised, or what it gave is no number."""


@dataclass(frozen=True)
class Scored:
    """rewards: label -> float32 (B, K), nan where there is none. failures: label -> for each group the reason, "" where it has a reward."""

    rewards: Mapping[str, Tensor]
    failures: Mapping[str, tuple[str, ...]]


def score(candidates: Candidates, config: Config, runtime: Runtime) -> Scored:
    """Rewards of all pools, asked at once, each in calls of `placement.<pool>.groups_per_call` groups."""
    pieces = {name: _pieces(candidates, config, name) for name in config.reward_pools}
    calls = [
        partial(_answer, runtime.rewards[name], config.reward_pools[name], piece)
        for name, parts in pieces.items()
        for piece in parts
    ]
    answers = iter(runtime.parallel(*calls))
    found = [_join([next(answers) for _ in parts]) for parts in pieces.values()]
    return Scored(
        {label: rewards for pool in found for label, rewards in pool.rewards.items()},
        {label: reasons for pool in found for label, reasons in pool.failures.items()},
    )


def _pieces(candidates: Candidates, config: Config, pool: str) -> list[Candidates]:
    """What goes into each call. The cut follows from the configuration alone, so results do not depend on the number of workers."""
    if not any(reward.reads_images for reward in config.reward_pools[pool]):
        candidates = replace(candidates, images=candidates.images[:, :0])
    return candidates.split(config.pieces(pool, len(candidates)))


def _answer(pool: Runtime, rewards: tuple[RewardConfig, ...], piece: Candidates) -> Scored:
    """What a pool says about one piece. An error that survived the pool's replays costs the piece's groups, not the run."""
    groups, count = piece.values.shape[:2]
    labels = [reward.label for reward in rewards]
    try:
        answered = pool.score(piece)
        if wrong := [label for label in labels if answered[label].shape != (groups, count)]:
            raise ValueError(f"{wrong[0]} answered {tuple(answered[wrong[0]].shape)} for {groups} groups of {count}")
    except PoolClosed:
        raise
    except Exception as error:
        logger.warning(
            "step %d: %d groups without %s: %s",
            piece.version,
            groups,
            ", ".join(labels),
            " ".join(str(error).split())[:300] or type(error).__name__,
        )
        nothing = torch.full((groups, count), torch.nan)
        return Scored(dict.fromkeys(labels, nothing), dict.fromkeys(labels, (_reason(error),) * groups))
    finite = {label: answered[label].isfinite().all(dim=1).tolist() for label in labels}
    return Scored(
        {label: answered[label] for label in labels},
        {label: tuple("" if one else "not_finite" for one in finite[label]) for label in labels},
    )


def _reason(error: Exception) -> str:
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    return "lost" if isinstance(error, WorkerError) and not isinstance(error, RoleFailed) else "error"


def _join(parts: list[Scored]) -> Scored:
    return Scored(
        {label: torch.cat([part.rewards[label] for part in parts]) for label in parts[0].rewards},
        {label: sum((part.failures[label] for part in parts), ()) for label in parts[0].failures},
    )
