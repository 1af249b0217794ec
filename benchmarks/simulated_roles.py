"""Roles that take a set time and do nothing, for benchmarks of the driver and the pools and for their tests under failures.

A reward's failures and costs travel in its `path`, as JSON, so that they reach every worker like any other setting.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from flashdmd_ray.batch import (
    Candidates,
    Fakes,
    Latents,
    NoiseLevels,
    PreferencePairs,
    Prompts,
    PublishedWeights,
    noise,
    to_uint8,
)
from flashdmd_ray.config import Config

SHAPE = (4, 8, 8)
ROLES = {
    "learner": {
        "generator": "simulated_roles:Generator",
        "score": "simulated_roles:Score",
        "discriminator": "simulated_roles:Discriminator",
    },
    "rollout": {"rollouts": "simulated_roles:Rollout"},
    "reward": {"rewards": "simulated_roles:Reward"},
}


def costs_of(config: Config) -> dict[str, Any]:
    """Seconds and failure shares by name, from the path of the first reward."""
    found: dict[str, Any] = json.loads(config.rewards[0].path)
    return found


class Simulated:
    """Role that takes the configured time for each call."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.costs = costs_of(config)
        self.weight = torch.zeros(SHAPE)

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Self:
        return cls(config)

    def spend(self, name: str) -> None:
        time.sleep(self.costs.get(name, 0.0))


class Generator(Simulated):
    used = 0

    def generate(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Fakes:
        self.spend("generate")
        latents = Latents(noise(prompts.indices, SHAPE, seed, "x"), prompts)
        return Fakes(latents, latents)

    def distillation_step(self, matching: Tensor, realism: Tensor) -> dict[str, float]:
        self.spend("update")
        self.weight = self.weight + 0.01
        return {"generator/loss": 0.0}

    def preference_step(self, pairs: PreferencePairs, rate: float = 1.0) -> dict[str, float]:
        self.spend("preference")
        self.used += int((pairs.weights > 0).sum())
        return {"preference/loss": 0.0}

    def pairs_used(self) -> int:
        """Number of preference pairs learnt from so far."""
        return self.used

    def live_weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def freeze_reference(self) -> None: ...


class Score(Simulated):
    def dm_gradient(self, high_noise: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
        self.spend("gradient")
        return torch.ones_like(high_noise.values), {"matching/gap": 0.0}

    def denoising_step(self, fakes: Latents, timesteps: Tensor, seed: int, real_positions: Tensor) -> dict[str, float]:
        self.spend("score")
        return {"score/loss": 0.0}

    def ema_update_from(self, generator: Generator, decay: float) -> None: ...


class Discriminator(Simulated):
    def gan_gradient(self, low_noise: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
        return torch.ones_like(low_noise.values), {"adversarial/loss": 0.0}

    def step(self, fakes: Latents, real_positions: Tensor) -> dict[str, float]:
        return {"discriminator/loss": 0.0}


class Rollout(Simulated):
    def candidates(
        self, prompts: Prompts, high: int, seed: int, weights: PublishedWeights, decode: bool = True
    ) -> Candidates:
        self.spend("rollout")
        values = noise(prompts.indices, (self.config.preference.candidates, *SHAPE), seed, "z")
        images = to_uint8(values[:, :, :3].repeat(1, 1, 1, 8, 8))  # 64 x 64
        return Candidates(prompts, values[:, 0], values, images, 999, 749, weights.version)


class Reward(Simulated):
    """Takes `reward` seconds. raises, nan, hangs: shares of the calls that end so. folder: where it leaves its process id."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.chance = random.Random(os.getpid())
        if "folder" in self.costs:
            (Path(self.costs["folder"]) / str(os.getpid())).touch()

    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        drawn = self.chance.random()
        for trouble in ("raises", "nan", "hangs"):
            share = self.costs.get(trouble, 0.0)
            if 0 <= drawn < share:
                break
            drawn -= share
        else:
            trouble = ""
        if trouble == "raises":
            raise KeyError("a reward that fails now and then")
        self.spend("reward" if trouble != "hangs" else "hang")
        rewards = candidates.values.flatten(2).mean(dim=2)
        if trouble == "nan":
            rewards[0, 0] = torch.nan
        return {self.config.rewards[0].label: rewards}

    def nothing(self, batch: Tensor) -> float:
        """Take `reward` seconds for a batch; return how long it really took."""
        started = time.perf_counter()
        self.spend("reward")
        return time.perf_counter() - started

    def busy(self, batch: Tensor, seconds: float) -> int:
        """Take `seconds`; return the process id."""
        return take_time(seconds)


def take_time(seconds: float) -> int:
    """Sleep; return the process id."""
    time.sleep(seconds)
    return os.getpid()


class NoData:
    """Prompts for the driver; the simulated discriminator needs no images."""

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        return tuple(f"{stream} {position}" for position in positions.tolist())
