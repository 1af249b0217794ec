"""Measure whether one reward orders the candidates of a prompt as another one does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Agreement of a reward with a reference within groups of candidates.

    groups: those in which both are finite and tell candidates apart. correlation: mean of their rank correlations (Spearman's). error: its
    standard error. best_beats_worst: share of groups in which the candidate that the reward puts first is better, by the reference, than
    the one it puts last.
    """

    groups: int
    correlation: float
    error: float
    best_beats_worst: float


def agreement(rewards: Tensor, reference: Tensor) -> Agreement | None:
    """Agreement of `rewards` with `reference`, each float (B, K); None when no group can be compared."""
    usable = rewards.isfinite().all(dim=1) & reference.isfinite().all(dim=1)
    rewards, reference = rewards[usable], reference[usable]
    x, y = centred(ranks(rewards)), centred(ranks(reference))
    norms = x.norm(dim=1) * y.norm(dim=1)
    resolved = norms > 0
    if not bool(resolved.any()):
        return None
    correlations = (x * y).sum(dim=1)[resolved] / norms[resolved]
    rewards, reference, rows = rewards[resolved], reference[resolved], torch.arange(len(correlations))
    difference = reference[rows, rewards.argmax(dim=1)] - reference[rows, rewards.argmin(dim=1)]
    error = correlations.std().item() / len(correlations) ** 0.5 if len(correlations) > 1 else 1.0
    wins = (0.5 + 0.5 * difference.sign()).mean().item()
    return Agreement(len(correlations), correlations.mean().item(), error, wins)


def ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row (B, K), float64 from 0; equal ones share the mean of theirs."""
    below = (values[:, :, None] > values[:, None, :]).sum(dim=2)
    not_above = (values[:, :, None] >= values[:, None, :]).sum(dim=2)
    return (below + not_above - 1).double() / 2


def centred(values: Tensor) -> Tensor:
    """Values (B, K) minus the mean of their row."""
    return values - values.mean(dim=1, keepdim=True)
