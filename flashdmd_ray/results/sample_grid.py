"""Sample grids: images of the generator while it is trained, generated where it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Prompts, derive_seed
from flashdmd_ray.config import Config
from flashdmd_ray.results.evaluation_data import choose_prompts
from flashdmd_ray.results.grid import write_grid
from flashdmd_ray.roles.labels import student_label, teacher_label
from flashdmd_ray.runtime.protocol import Runtime

COLUMNS = 10
"""Prompts of a grid, of those written on the way and of the one at the end."""


class SampleGrid:
    """The teacher's row above the student's, of the same prompts and noise each time."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        """Raises ValueError for prompts that cannot be read."""
        self.config = config
        self.runtime = runtime
        self.seed = derive_seed(config.seed, "sheet")
        self.texts = choose_prompts(config, COLUMNS, self.seed)
        self.prompts = equal_shards(self.texts, config.placement.learner.workers)
        self._teacher: Tensor | None = None

    def write(self, path: Path) -> Path:
        """Write the grid for the generator as it is now; returns `path`."""
        evaluation, guidance = self.config.evaluation, self.config.teacher_guidance
        if self._teacher is None:
            self._teacher = self.runtime.score.generate_teacher_images(
                self.prompts, evaluation.teacher_steps, guidance, self.seed
            )
        timesteps = self.config.sampling.timesteps
        rows = [
            (teacher_label(evaluation.teacher_steps, guidance), self._teacher),
            (student_label("student", timesteps), self.student_images(timesteps)),
        ]
        return write_grid(path, [(label, images[: len(self.texts)]) for label, images in rows], self.texts)

    def student_images(self, timesteps: tuple[int, ...]) -> Tensor:
        """One image of the generator for each prompt, denoised at `timesteps`, float (N, 3, H, W) in [-1, 1]."""
        images: Tensor = self.runtime.generator.generate_images(self.prompts, timesteps, self.seed)
        return images[: len(self.texts)]


def equal_shards(texts: Sequence[str], ranks: int) -> Prompts:
    """Prompts of these texts, the last one repeated until every rank gets equally many: all ranks must make the same forwards."""
    count = -(-len(texts) // ranks) * ranks
    return Prompts((*texts, *[texts[-1]] * (count - len(texts))), torch.arange(count))
