"""The command that benchmarks/chaos.py runs and strikes: joint training whose score estimator gives one NaN when a file asks for it."""

from __future__ import annotations

import os
import sys
from typing import Any

from small_roles import ROLES, nan_is_due
from torch import Tensor

from flashdmd_ray.batch import Latents, Metrics
from flashdmd_ray.roles.score_estimator import ScoreEstimator

SMALL = "FLASHDMD_CHAOS_SMALL"
"""Environment variable: train small_roles.py instead of the demo's networks, and draw nothing of them."""


class StruckScoreEstimator(ScoreEstimator):
    """Gives a gradient with a NaN where one is due."""

    def dm_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        gradient, metrics = super().dm_gradient(fakes, timesteps, seed)
        if nan_is_due():
            gradient[0] *= float("nan")
        return gradient, metrics


def train_small_roles() -> None:
    """Let the job train small roles and end with an empty report."""
    from flashdmd_ray.results import report
    from flashdmd_ray.runtime import build
    from flashdmd_ray.training.sample_grids import SampleGrids

    def empty_report(config: Any, directory: Any, tracker: Any, say: Any) -> None:
        (directory.path / "report.json").write_text("{}")

    build.ROLES = ROLES
    report.report = empty_report  # type: ignore[assignment]
    SampleGrids.after_step = lambda *_: None  # type: ignore[method-assign]


if __name__ == "__main__":
    from flashdmd_ray.runtime import build
    from flashdmd_ray.training.cli import main

    build.ROLES["learner"]["score"] = "chaos_job:StruckScoreEstimator"  # type: ignore[index]
    if os.environ.get(SMALL):
        train_small_roles()
    sys.exit(main())
