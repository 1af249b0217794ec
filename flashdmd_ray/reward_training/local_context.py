"""A single process that trains, with checkpoints in folders of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from flashdmd_ray.batch import Metrics
from flashdmd_ray.reward_training.training import STEP
from flashdmd_ray.run.files import new_folder


class LocalContext:
    """`TrainContext` of a single process: checkpoints are folders that appear complete, in one rename."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep, self._stopping = folder, keep, False

    def stop(self) -> None:
        """Leave after this step."""
        self._stopping = True

    def is_stopping(self) -> bool:
        return self._stopping

    def newest_checkpoint(self) -> Path | None:
        return max(self._complete(), default=None)

    def save_checkpoint(self, step: int, metrics: Metrics, write: Callable[[Path], None]) -> None:
        with new_folder(self._folder / f"step-{step:08}") as unfinished:
            write(unfinished)
        for old in sorted(self._complete())[: -self._keep]:
            shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        return [path.parent for path in self._folder.glob(f"step-*/{STEP}")]
