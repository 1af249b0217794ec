"""The figures of a step for Prometheus: gauges that Ray shows at the metrics port of the driver's node."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RunGauges:
    """Shows a run as `ray_flashdmd_step{run}` and `ray_flashdmd_metric{run, metric}`, until the driver ends. Ray adds the prefix."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._step = Gauge("flashdmd_step", "Steps done.", tag_keys=("run",))
        self._metric = Gauge("flashdmd_metric", "A metric of the newest step.", tag_keys=("run", "metric"))

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges; what is not finite keeps its last value."""
        self._step.set(step, {"run": self._run})
        for name, value in metrics.items():
            if math.isfinite(value):
                self._metric.set(float(value), {"run": self._run, "metric": name})
