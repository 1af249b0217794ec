"""Accuracy of rewards on held-out pairs: by timestep for the latent reward, on clean images for pixel rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.diffusion.sampling import timesteps_like
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.rewards import PixelReward
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.pairs import PairFiles, Pairs
from flashdmd_ray.reward_training.training import encode_pairs, noised, pair_rewards
from flashdmd_ray.reward_training.verdicts import judge

Z95, Z99 = 1.959964, 2.575829
NOISES = ("own", "shared")
"""own: each image has noise of its own, as candidates in a run have. shared: both the same."""
REFERENCES = ("labels", "truth")
"""labels: what was trained on. truth: the labels of the source, where rewards gave other ones."""


def wilson(right: float, count: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share, (low, high); (0, 1) when nothing was counted.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = right / n
    """
    if not count:
        return 0.0, 1.0
    p, scale = right / count, z * z / count
    centre, half = p + scale / 2, z * math.sqrt(p * (1 - p) / count + scale / (4 * count))
    low, high = (centre - half) / (1 + scale), (centre + half) / (1 + scale)
    return (0.0 if right == 0 else low), (1.0 if right == count else high)  # exact where rounding would leave the range


@dataclass
class Counts:
    """Counts by name: [pairs ordered as the reference says, pairs that it decides]; equal rewards count a half."""

    of: dict[str, list[float]] = field(default_factory=dict)
    pairs: int = 0
    ties: int = 0

    def add(self, name: str, rewards: Tensor, pairs: Pairs) -> None:
        """rewards: float (B, 2), on any device."""
        difference = (rewards[:, 0] - rewards[:, 1]).cpu()
        for reference in REFERENCES:
            label = getattr(pairs, reference)
            decided = label != 0.5
            right = 0.5 + 0.5 * (difference.sign() * (label - 0.5).sign())[decided]
            count = self.of.setdefault(f"{reference}/{name}", [0.0, 0.0])
            count[0] += float(right.sum())
            count[1] += float(decided.sum())

    def sum_over_ranks(self) -> None:
        """Every rank has the counts of all. Collective; all ranks have the same names."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.of, self.pairs, self.ties))
        names = [name for of, _, _ in parts for name in of]
        self.of = {n: [sum(of[n][i] for of, _, _ in parts if n in of) for i in (0, 1)] for n in dict.fromkeys(names)}
        self.pairs, self.ties = (sum(part[i] for part in parts) for i in (1, 2))


@torch.no_grad()
def count_right(
    config: RewardTrainingConfig,
    family: Family,
    model: NoisyLatentReward,
    judges: Mapping[str, PixelReward],
    pairs: PairFiles,
    rank: int = 0,
    world_size: int = 1,
) -> Counts:
    """Judge the first `accuracy.pairs` held-out pairs, this rank's share of them; the counts of all ranks together."""
    settings, counts = config.accuracy, Counts()
    numbers = pairs.first(settings.pairs)[rank::world_size].tolist()
    for start in range(0, len(numbers), settings.batch):
        rows = numbers[start : start + settings.batch]
        batch = pairs.at(rows)
        counts.pairs += len(rows)
        counts.ties += int((batch.labels == 0.5).sum())
        for name, rewards in judge(judges, batch.images.to(family.device), batch.texts).items():
            counts.add(f"pixel/{name}", rewards, batch)
        clean = encode_pairs(family, batch.images)
        indices = torch.tensor(rows, device=clean.device)
        for timestep in settings.timesteps:
            seed, times = derive_seed(config.seed, "accuracy", timestep), timesteps_like(timestep, clean)
            for kind in NOISES:
                noisy = noised(family, clean, times, indices, seed, kind)
                counts.add(f"{kind}/{timestep}", pair_rewards(family, model, noisy, times, batch.texts), batch)
    counts.sum_over_ranks()
    return counts


def as_report(counts: Counts, timesteps: Sequence[int], judges: Sequence[str]) -> dict[str, Any]:
    """The accuracies as JSON values. `truth` is left out where it is what was trained on."""
    own_truth = any(counts.of[f"truth/{name}"] != counts.of[f"labels/{name}"] for name in _names(timesteps, judges))
    against = {}
    for reference in REFERENCES if own_truth else REFERENCES[:1]:
        against[reference] = {
            "pixel": {name: _share(counts.of[f"{reference}/pixel/{name}"]) for name in judges},
            "latent": {
                str(t): {kind: _share(counts.of[f"{reference}/{kind}/{t}"]) for kind in NOISES} for t in timesteps
            },
        }
    return {"pairs": counts.pairs, "ties": counts.ties, "against": against}


def _names(timesteps: Sequence[int], judges: Sequence[str]) -> list[str]:
    return [f"{kind}/{t}" for kind in NOISES for t in timesteps] + [f"pixel/{name}" for name in judges]


def _share(counted: Sequence[float]) -> dict[str, Any]:
    right, count = counted
    low, high = wilson(right, count)
    return {
        "accuracy": right / count if count else None,
        "low": low,
        "high": high,
        "count": int(count),
        "above_chance_99": wilson(right, count, Z99)[0] > 0.5,
    }


def table(report: Mapping[str, Any]) -> list[str]:
    """Lines of a markdown table, 95 % intervals in brackets; a star is above chance with 99 % confidence."""
    lines = []
    for reference, entry in report["against"].items():
        what = "the labels trained on" if reference == "labels" else "the labels of the source"
        best = max((share["accuracy"] or 0 for share in entry["pixel"].values()), default=0)
        lines += [
            f"Pair accuracy against {what}, {report['pairs']:,} held-out pairs, {report['ties']:,} ties left out",
            "",
        ]
        lines += ["| reward | sees | noise of its own | same noise | of the pixel reward |", "|---|---|---|---|---|"]
        lines += [f"| {name} | the clean image | {_cell(share)} | | |" for name, share in entry["pixel"].items()]
        for timestep, by in entry["latent"].items():
            ratio = f"{by['own']['accuracy'] / best:.2f}" if best and by["own"]["accuracy"] else ""
            lines.append(f"| latent | t = {timestep} | {_cell(by['own'])} | {_cell(by['shared'])} | {ratio} |")
        lines.append("")
    return lines[:-1]


def _cell(share: Mapping[str, Any]) -> str:
    if share["accuracy"] is None:
        return "-"
    star = " *" if share["above_chance_99"] else ""
    return f"{share['accuracy']:.3f} [{share['low']:.3f}, {share['high']:.3f}]{star}"
