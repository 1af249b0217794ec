"""Roles with one small tensor, which learn, save and load as the real ones do, for long runs in which the driver is of interest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from flashdmd_ray.batch import (
    Candidates,
    Fakes,
    Latents,
    Metrics,
    NoiseLevels,
    PreferencePairs,
    Prompts,
    PublishedWeights,
    noise,
    to_uint8,
)
from flashdmd_ray.checkpoint import Destination, Saved, load_tensors, save_part
from flashdmd_ray.config import Config

SHAPE = (4, 16, 16)
FOLDER = "FLASHDMD_CHAOS"
"""Environment variable: the folder of requests, and what marks every process of a run under benchmarks/chaos.py."""


def nan_is_due() -> bool:
    """Return True once for each file `nan`."""
    request = Path(os.environ[FOLDER]) / "nan"
    if due := request.exists():
        request.unlink()
    return due


class Small(Saved):
    """A tensor, and a rule by which it learns."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.weight = noise(torch.arange(1), SHAPE, config.seed, type(self).__name__)[0]

    @classmethod
    def from_config(cls, config: Config, rank: int = 0, world_size: int = 1) -> Self:
        return cls(config)

    def learn(self, gradient: Tensor) -> float:
        """Raises FloatingPointError when the gradient is not finite."""
        if not gradient.isfinite().all():
            raise FloatingPointError(f"{type(self).__name__}: the gradient is not finite")
        self.weight = self.weight - 0.01 * gradient.mean(0)
        return float(gradient.norm())

    def save(self, directory: Destination) -> None:
        save_part(directory / f"{type(self).__name__}.safetensors", {"weight": self.weight.clone()})

    def load(self, directory: Path) -> None:
        self.weight = load_tensors(directory / f"{type(self).__name__}.safetensors")["weight"]

    def data_report(self) -> dict[str, Any]:
        return {}


class Generator(Small):
    def generate(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Fakes:
        latents = Latents(noise(prompts.indices, SHAPE, seed, "x") + self.weight, prompts)
        return Fakes(latents, latents)

    def distillation_step(self, matching: Tensor, realism: Tensor) -> Metrics:
        return {"generator/grad_norm": self.learn(matching + realism)}

    def preference_step(self, pairs: PreferencePairs, rate: float = 1.0) -> Metrics:
        return {"preference/grad_norm": self.learn((pairs.losers - pairs.winners) * rate)}

    def live_weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def freeze_reference(self) -> None: ...

    def update_ema(self) -> None: ...


class Score(Small):
    def dm_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        gradient = (fakes.values - self.weight) * timesteps.view(-1, 1, 1, 1) / 1000
        return gradient * float("nan") if nan_is_due() else gradient, {}

    def denoising_step(self, fakes: Latents, timesteps: Tensor, seed: int, real_positions: Tensor) -> Metrics:
        return {"score/grad_norm": self.learn(self.weight - fakes.values)}

    def ema_update_from(self, generator: Generator, decay: float) -> None:
        self.weight = decay * self.weight + (1 - decay) * generator.weight


class Discriminator(Small):
    def gan_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        return torch.tanh(fakes.values) * self.weight, {}

    def step(self, fakes: Latents, real_positions: Tensor) -> Metrics:
        return {"discriminator/grad_norm": self.learn(torch.tanh(fakes.values))}


class Rollout(Small):
    def candidates(
        self, prompts: Prompts, high: int, seed: int, weights: PublishedWeights, decode: bool = True
    ) -> Candidates:
        values = noise(prompts.indices, (self.config.preference.candidates, *SHAPE), seed, "z")
        values = values + weights.tensors["weight"]
        return Candidates(prompts, values[:, 0], values, to_uint8(values[:, :, :3]), 999, 749, weights.version)


class Reward(Small):
    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        rewards = candidates.values.flatten(2).mean(dim=2)
        return {reward.label: rewards for reward in self.config.rewards}


ROLES = {
    "learner": {"generator": "small_roles:Generator", "score": "small_roles:Score"},
    "discriminator": {"discriminator": "small_roles:Discriminator"},
    "rollout": {"rollouts": "small_roles:Rollout"},
    "reward": {"rewards": "small_roles:Reward"},
}
