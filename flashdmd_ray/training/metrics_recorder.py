"""The record of metrics: `metrics.jsonl` of the run folder, what mirrors it, and Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.training.observer import Observer


class MetricsRecorder(Observer):
    """Records the metrics of every `tracking.log_every`-th step and of the last one."""

    def __init__(self, config: Config, tracker: Tracker, data_counts: Metrics) -> None:
        """data_counts: samples of the data, good and bad, recorded with every step."""
        self._config = config
        self._tracker = tracker
        self._data_counts = data_counts
        self._gauges = None
        if config.runtime == "ray":
            from flashdmd_ray.runtime.gauges import RunGauges  # and with it Ray

            self._gauges = RunGauges(config.run.name)

    def load(self, done: int, state: Mapping[str, Any]) -> None:
        self._tracker.rewind(done)  # steps after the checkpoint will be done, and recorded, again

    def after_step(self, done: int, metrics: Metrics) -> None:
        if done == self._config.steps or done % self._config.tracking.log_every == 0:
            self._tracker.metrics(done, metrics | self._data_counts)
            if self._gauges is not None:
                self._gauges.show(done, metrics)
