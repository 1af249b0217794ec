"""Interface of everything that follows the training loop: records, pictures, the hack monitor, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flashdmd_ray.batch import Metrics
from flashdmd_ray.run.messages import one_line

log = logging.getLogger(__name__)


class Observer:
    """Sees the end of every step in the order of `TrainingRun.observers`, its beginning in the reverse. Does nothing by itself."""

    def load(self, done: int, state: Mapping[str, Any]) -> None:
        """Continue after `done` steps. state: what every observer's `state` returned then, together; empty when nothing was done yet."""

    def before_step(self, step: int) -> None:
        """Called before step number `step`, counted from 0."""

    def after_step(self, done: int, metrics: Metrics) -> None:
        """Called when `done` steps are done. metrics: of the last one; what is added here, the observers behind see too."""

    def state(self) -> dict[str, Any]:
        """JSON values of what has to live on in a checkpoint, under keys of its own."""
        return {}


@contextmanager
def left_out_without_room() -> Iterator[None]:
    """Say and leave out a picture that cannot be written: a full disk is no reason to end a run."""
    try:
        yield
    except OSError as error:
        log.warning("%s: a picture is left out", one_line(error))
