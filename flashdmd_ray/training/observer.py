"""Interface of everything that follows the training loop: records, pictures, the hack monitor, checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdmd_ray.batch import Metrics


class Observer:
    """Sees every step of the loop, in the order of `TrainingRun.observers`. Does nothing by itself."""

    def load(self, done: int, state: Mapping[str, Any]) -> None:
        """Continue after `done` steps. state: what every observer's `state` returned then, together; empty when nothing was done yet."""

    def before_step(self, step: int) -> None:
        """Called before step number `step`, counted from 0."""

    def after_step(self, done: int, metrics: Metrics) -> None:
        """Called when `done` steps are done. metrics: of the last one; what is added here, the observers behind see too."""

    def state(self) -> dict[str, Any]:
        """JSON values of what has to live on in a checkpoint, under keys of its own."""
        return {}
