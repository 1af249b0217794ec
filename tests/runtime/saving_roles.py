"""Roles of several ranks that save parts, for the tests of checkpoints on Ray."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from flashdmd_ray.checkpoint import Destination, Saved, save_part

SAVING = {
    "learner": {"generator": "saving_roles:Generator", "score": "saving_roles:ScoreEstimator"},
    "discriminator": {"discriminator": "saving_roles:Discriminator"},
}


class Saving(Saved):
    """Every rank holds a tensor and writes it to a file of its own; with a prefix that is too long for a file name, in vain."""

    def __init__(self, config: Any, rank: int, world_size: int) -> None:
        self.rank, self.prefix = rank, ""
        self.weights = torch.full((10,), float(rank))

    @classmethod
    def from_config(cls, config: Any, rank: int, world_size: int) -> Saving:
        return cls(config, rank, world_size)

    def step(self) -> None:
        self.weights += 10

    def name_with(self, prefix: str) -> None:
        self.prefix = prefix

    def save(self, directory: Destination) -> None:
        name = f"{type(self).__name__}-{self.rank}.safetensors"
        save_part(directory / f"{self.prefix}{name}", {"w": self.weights.clone()})

    def dies(self, only_rank: int) -> None:
        if self.rank == only_rank:
            os.kill(os.getpid(), signal.SIGKILL)


class Generator(Saving):
    pass


class ScoreEstimator(Saving):
    pass


class Discriminator(Saving):
    pass
