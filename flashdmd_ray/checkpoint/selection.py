"""Selection of a checkpoint: the newest, the best, the newest healthy one, or that of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Self

from flashdmd_ray.checkpoint.manifest import (
    DamagedCheckpoint,
    Manifest,
    manifests,
    newest_first,
    verify_checkpoint,
)
from flashdmd_ray.config import CheckpointConfig
from flashdmd_ray.monitor import SEVERITY
from flashdmd_ray.run.storage import Location


def newest_healthy(candidates: Iterable[Manifest]) -> Manifest | None:
    """Return the first of `candidates`, newest first, that was written while the hack monitor found the run healthy, if any."""
    return next((m for m in candidates if m.metrics.get(SEVERITY) == 0), None)


@dataclass(frozen=True)
class Best:
    """Criterion for the best checkpoint of a run: the smallest or the largest value of a metric."""

    metric: str
    mode: Literal["min", "max"]

    @classmethod
    def from_config(cls, settings: CheckpointConfig) -> Self | None:
        """Build the configured criterion; None when the configuration names no metric."""
        return None if settings.best_metric is None else cls(settings.best_metric, settings.best_mode)

    def of(self, candidates: Iterable[Manifest]) -> Manifest | None:
        """Return the best of `candidates`, of equals the newest; None when none recorded the metric as a finite number."""
        sign = 1.0 if self.mode == "min" else -1.0
        judged = [m for m in candidates if math.isfinite(m.metrics.get(self.metric, math.nan))]
        return min(judged, key=lambda m: (sign * m.metrics[self.metric], -m.serial), default=None)


def latest_checkpoint(root: Location) -> Location | None:
    """Return the newest checkpoint, verified; None when there is none.

    A damaged one is never passed over in silence: ValueError names the file and says how to go back to the one before.
    """
    folders = newest_first(root)
    if not folders:
        return None
    with explain_damage(root):
        return verify_checkpoint(folders[0])


def latest_step(root: Location) -> int:
    """Return the step of the newest checkpoint whose manifest can be read, by that alone; 0 when there is none."""
    return next((manifest.step for manifest in manifests(root)), 0)


@contextmanager
def explain_damage(root: Location) -> Iterator[None]:
    """Add the user's choices to the error about the newest checkpoint: nothing goes back to an older one by itself."""
    try:
        yield
    except DamagedCheckpoint as error:
        newest, *older = newest_first(root)
        then = f"go back to {older[0].name}" if older else "start from step 0"
        raise DamagedCheckpoint(f"{error}; restore it, or delete or move {newest} to {then}") from None


def select_checkpoint(root: Location, which: str, best: Best | None) -> Location:
    """Return the checkpoint that `which` names, verified.

    which: 'latest', 'best' (by `best`), 'healthy' (the newest that the hack monitor found so) or a step. Raises ValueError when there is
    no such checkpoint or it is damaged.
    """
    if which == "latest":
        latest = latest_checkpoint(root)
        if latest is None:
            raise ValueError(f"{root} holds no complete checkpoint: train to the first one")
        return latest
    candidates = manifests(root)
    if which == "best":
        return verify_checkpoint(_best(candidates, best, root).folder)
    if which == "healthy":
        return verify_checkpoint(_healthy(candidates, root).folder)
    if not which.isascii() or not which.isdigit():
        raise ValueError(f"--checkpoint {which}: expected latest, best, healthy or a step such as 200")
    for manifest in candidates:
        if manifest.step == int(which):
            return verify_checkpoint(manifest.folder)
    raise ValueError(f"--checkpoint {which}: {root} holds {_steps(candidates)}")


def _best(candidates: Sequence[Manifest], best: Best | None, root: Location) -> Manifest:
    if best is None:
        raise ValueError("--checkpoint best: the run was trained without checkpoint.best_metric; name a step or latest")
    best_one = best.of(candidates)
    if best_one is None:
        raise ValueError(f"--checkpoint best: no checkpoint at {root} recorded {best.metric}; name a step or latest")
    return best_one


def _healthy(candidates: Sequence[Manifest], root: Location) -> Manifest:
    healthy = newest_healthy(candidates)
    if healthy is None:
        raise ValueError(
            f"--checkpoint healthy: the hack monitor found no checkpoint at {root} healthy; name a step or latest"
        )
    return healthy


def _steps(candidates: Sequence[Manifest]) -> str:
    return f"steps {', '.join(str(m.step) for m in reversed(candidates))}" if candidates else "no complete checkpoint"
