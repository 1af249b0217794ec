"""The command that benchmarks/chaos.py runs and strikes: joint training whose score estimator gives one NaN when a file asks for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import Tensor

from flashdmd_ray.batch import Latents, Metrics
from flashdmd_ray.roles.score_estimator import ScoreEstimator

FOLDER = "FLASHDMD_CHAOS"
"""Environment variable: the folder of the request, and what marks every process of the run."""


class StruckScoreEstimator(ScoreEstimator):
    """Gives a gradient with a NaN, once for each file `nan`."""

    def dm_gradient(self, fakes: Latents, timesteps: Tensor, seed: int) -> tuple[Tensor, Metrics]:
        gradient, metrics = super().dm_gradient(fakes, timesteps, seed)
        request = Path(os.environ[FOLDER]) / "nan"
        if request.exists():
            request.unlink()
            gradient[0] *= float("nan")
        return gradient, metrics


if __name__ == "__main__":
    from flashdmd_ray.runtime import build
    from flashdmd_ray.training.cli import main

    build.ROLES["learner"]["score"] = "chaos_job:StruckScoreEstimator"  # type: ignore[index]
    sys.exit(main())
