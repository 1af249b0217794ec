"""Counters of a run: updates of each kind, samples and seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.training.observer import Observer


class Counters(Observer):
    """Counts over the whole run, whatever the number of its attempts."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._counts = {"generator_updates": 0, "score_updates": 0, "preference_updates": 0, "samples": 0}
        self._seconds = 0.0
        self._started = time.monotonic()

    def load(self, done: int, state: Mapping[str, Any]) -> None:
        self._counts |= state.get("counters", {})
        self._seconds = state.get("seconds", 0.0)

    def after_step(self, done: int, metrics: Metrics) -> None:
        if self._config.preference.distill:
            self._counts["generator_updates"] += 1
            self._counts["score_updates"] += self._config.ttur
            self._counts["samples"] += self._config.batch
        self._counts["preference_updates"] += int(metrics.pop("preference/updates", 0))
        metrics |= {f"count/{name}": float(count) for name, count in self._counts.items()}

    def state(self) -> dict[str, Any]:
        return {"counters": dict(self._counts), "seconds": self._seconds + time.monotonic() - self._started}
