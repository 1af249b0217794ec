"""One attempt at a run: the steps that are left, and what follows each of them."""

from __future__ import annotations

from collections.abc import Iterator

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.results.sample_grid import SampleGrid
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.training.beta_check import BetaCheck
from flashdmd_ray.training.checkpoints import Checkpoints
from flashdmd_ray.training.counters import Counters
from flashdmd_ray.training.hack_watch import HackWatch
from flashdmd_ray.training.metrics_recorder import MetricsRecorder
from flashdmd_ray.training.monitor_pictures import FOLDER, MonitorPictures
from flashdmd_ray.training.observer import Observer
from flashdmd_ray.training.progress_line import ProgressLine
from flashdmd_ray.training.sample_grids import SampleGrids
from flashdmd_ray.training.step_times import StepTimes


class TrainingRun:
    """See `driver.Run`. Everything it does of its own is to hand each step to its observers, in their order."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        runtime: Runtime,
        tracker: Tracker,
        progress: Progress,
        stop: Interruption,
        data_counts: Metrics,
    ) -> None:
        """data_counts: samples of the data, good and bad, recorded with every step."""
        self.config = config
        self.stop = stop
        self.done = 0
        self.preference_rate = 1.0
        grid = SampleGrid(config, runtime)
        pictures = MonitorPictures(directory.path / FOLDER, grid, config.sampling.timesteps)
        self.watch = HackWatch(config, pictures, tracker, progress)
        followers: list[Observer] = [
            StepTimes(config, runtime.times, directory.path),
            ProgressLine(config, progress),  # before others say something, which restarts its clock
            self.watch,
            Counters(config),
            MetricsRecorder(config, tracker, data_counts),
            BetaCheck(config.preference.beta),
            SampleGrids(config, directory, grid, tracker, progress.say),
        ]
        self.checkpoints = Checkpoints(config, directory, runtime, followers, self.watch.monitor, stop)
        self.observers = [*followers, self.checkpoints]

    def restore(self) -> None:
        """Start from the newest complete checkpoint, if there is one. Raises ValueError when it is of another run."""
        state = self.checkpoints.restore()
        self.done = state.get("step", 0)
        for observer in self.observers:
            observer.load(self.done, state)
        self.preference_rate = self.watch.monitor.preference_rate

    @property
    def is_stopping(self) -> bool:
        """True once a signal or the hack monitor has asked to stop."""
        return self.stop.requested or self.watch.monitor.wants_stop

    def steps(self) -> Iterator[int]:
        """Yield the steps not yet done, until the last one or a stop."""
        while self.done < self.config.steps and not self.is_stopping:
            for observer in reversed(self.observers):
                observer.before_step(self.done)
            yield self.done

    def finish(self, step: int, metrics: Metrics) -> None:
        """Show the step to every observer. Raises CheckpointError when a checkpoint could not be written."""
        self.done = step + 1
        metrics = dict(metrics)
        for observer in self.observers:
            observer.after_step(self.done, metrics)
        self.preference_rate = self.watch.monitor.preference_rate
