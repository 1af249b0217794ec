"""Sample grids of the run folder: what the generator draws while it is trained."""

from __future__ import annotations

from collections.abc import Callable

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.results.sample_grid import SampleGrid
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.progress import still
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.training.observer import Observer, left_out_without_room


class SampleGrids(Observer):
    """Writes a grid after every `tracking.samples_every`-th step and after the last one."""

    def __init__(
        self, config: Config, directory: RunDirectory, grid: SampleGrid, tracker: Tracker, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._directory = directory
        self._grid = grid
        self._tracker = tracker
        self._say = say

    def after_step(self, done: int, metrics: Metrics) -> None:
        if done == self._config.steps or done % self._config.tracking.samples_every == 0:
            with left_out_without_room(), still(self._say, lambda: f"drawing the sample grid of step {done}"):
                path = self._grid.write(self._directory.samples / f"step-{done:06d}.png")
                self._tracker.image("samples", path, done)
