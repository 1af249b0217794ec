"""Roles small enough to be read at a glance, with the methods of the real ones, and with ways to fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from flashdmd_ray.batch import (
    Candidates,
    Latents,
    NoiseLevels,
    PreferencePairs,
    Prompts,
    PublishedWeights,
    noise,
    to_uint8,
)
from flashdmd_ray.config import Config, parse_config

SHAPE = (4, 16, 16)  # large enough to stay in the object store
TOYS = {
    "learner": {"generator": "toy_roles:Generator", "score": "toy_roles:ScoreEstimator"},
    "discriminator": {"discriminator": "toy_roles:Discriminator"},
    "rollout": {"rollouts": "toy_roles:Rollout"},
    "reward": {"rewards": "toy_roles:Reward"},
}


def toy_config(runtime: str = "ray", **settings: Any) -> Config:
    """A configuration with a short deadline for calls; settings: dotted keys with '__' for the dot."""
    tree: dict[str, Any] = {
        "runtime": runtime,
        "preference": {"candidates": 3},
        "deadlines": {"call_s": 20.0, "reward_s": 20.0, "start_s": 600.0, "retries": 2},
    }
    for key, value in settings.items():
        *parents, last = key.split("__")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return parse_config(tree)


class Toy:
    """A linear map with a learning rule, and what every role can be asked in a test."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self.config = config
        self.weight = noise(torch.arange(2), SHAPE, config.seed, type(self).__name__)[0]
        self.rank, self.world_size = rank, world_size

    @classmethod
    def from_config(cls, config: Config, rank: int, world_size: int) -> Self:
        return cls(config, rank, world_size)

    def step_along(self, gradient: Tensor) -> float:
        """One update with the mean gradient over the global batch; returns its norm."""
        total, count = gradient.sum(0), torch.tensor(float(len(gradient)))
        if self.world_size > 1:
            dist.all_reduce(total)
            dist.all_reduce(count)
        self.weight = self.weight - 0.1 * total / count
        return float((total / count).norm())

    def save(self, directory: Path) -> None:
        if self.rank == 0:
            torch.save(self.weight, directory / f"{type(self).__name__}.pt")

    def load(self, directory: Path) -> None:
        self.weight = torch.load(directory / f"{type(self).__name__}.pt")

    def live_weights(self) -> dict[str, Tensor]:
        return self.weights()

    def weights(self) -> dict[str, Tensor]:
        return {} if self.rank else {"weight": self.weight}

    def facts(self) -> tuple[str, ...]:
        return (
            str(torch.get_num_threads()),
            os.environ.get("OMP_NUM_THREADS", ""),
            os.environ.get("MALLOC_TRIM_THRESHOLD_", ""),
        )

    def pids(self, seconds: float = 0.0) -> Tensor:
        time.sleep(seconds)
        return torch.tensor([os.getpid()])

    def raises(self, kind: type[Exception], only_rank: int | None = None) -> None:
        if only_rank in (None, self.rank):
            raise kind(f"raised in rank {self.rank}")
        time.sleep(30)

    def echo(self, value: Any) -> Any:
        return value

    def sleeps(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def dies(self, only_rank: int | None = None) -> None:
        if only_rank in (None, self.rank):
            print(f"last words of {type(self).__name__.lower()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)

    def fails_first(self, marker: Path, how: str) -> int:
        """Die, hang, fail or raise at the first call anywhere; later calls answer with the process id."""
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return os.getpid()
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(60)
        raise KeyError("a passing trouble") if how == "raise" else RuntimeError("a passing trouble")


class Generator(Toy):
    def generate(self, prompts: Prompts, levels: NoiseLevels, seed: int) -> Latents:
        assert len(levels) == len(prompts)
        assert levels.low_noise is None or isinstance(levels.low_noise, int)
        own = 1 + levels.high_noise[:, None, None, None]
        return Latents(noise(prompts.indices, SHAPE, seed, f"x/{levels.max_step}") * own * self.weight, prompts)

    def distillation_step(self, matching: Tensor, realism: Tensor) -> dict[str, float]:
        matching += 0 * realism  # a role may write to what it received: it must not be a view of shared memory
        norm = self.step_along(matching + realism)
        return {"generator/norm": norm, "generator/first": float(matching.flatten(1).sum(1).mean())}

    def preference_step(self, pairs: PreferencePairs) -> dict[str, float]:
        return {"preference/norm": self.step_along(pairs.losers - pairs.winners)}


class ScoreEstimator(Toy):
    def dm_gradient(self, high_noise: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
        drawn = noise(high_noise.prompts.indices, SHAPE, seed, "score")
        gradient = (high_noise.values - self.weight * drawn) * timesteps.view(-1, 1, 1, 1) / 1000
        return gradient, {"score/gap": float(gradient.abs().mean())}

    def denoising_step(self, fakes: Latents, timesteps: Tensor) -> dict[str, float]:
        return {"score/norm": self.step_along(fakes.values * timesteps.view(-1, 1, 1, 1) / 1000)}

    def ema_update_from(self, generator: Generator, decay: float) -> None:
        self.weight = decay * self.weight + (1 - decay) * generator.weight


class Discriminator(Toy):
    def gan_gradient(self, low_noise: Latents) -> tuple[Tensor, dict[str, float]]:
        return torch.tanh(low_noise.values) * self.weight, {"discriminator/mean": float(low_noise.values.mean())}

    def step(self, fakes: Latents, real_indices: Tensor) -> dict[str, float]:
        return {"discriminator/norm": self.step_along(fakes.values * real_indices.view(-1, 1, 1, 1))}


class Rollout(Toy):
    neighbour = "generator"

    @classmethod
    def from_neighbour(cls, generator: Generator) -> Rollout:
        made = cls(generator.config, generator.rank, generator.world_size)
        made.generator = generator
        return made

    generator: Generator | None = None

    def candidates(
        self, prompts: Prompts, high: int, seed: int, weights: PublishedWeights, decode: bool = True
    ) -> Candidates:
        drawn = noise(prompts.indices, (3, *SHAPE), seed, f"candidates/{high}")
        values = drawn * (weights.tensors["weight"] if self.generator is None else self.generator.weight)
        return Candidates(prompts, values[:, 0], values, to_uint8(values), 999, 749, weights.version)


class Reward(Toy):
    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        return {"toy": candidates.values.flatten(2).sum(2)}
