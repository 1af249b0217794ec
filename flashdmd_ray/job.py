"""One joint training job from start to end: run folder, resume, the loop, then the table, the grid and the export."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from flashdmd_ray.checkpoint import latest_checkpoint, read_state, write_checkpoint
from flashdmd_ray.config import Config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.interruption import Interruption
from flashdmd_ray.progress import Progress
from flashdmd_ray.report import SampleSheet, report
from flashdmd_ray.roles.networks import Metrics, load_family
from flashdmd_ray.run_directory import RunDirectory
from flashdmd_ray.runtime.build import build_runtime
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.runtime.supervisor import run_supervised
from flashdmd_ray.tracking import Tracker

log = logging.getLogger(__name__)

SHOWN = {
    "matching/real_fake_gap": "gap",
    "discriminator/accuracy_real": "D real",
    "discriminator/accuracy_fake": "D fake",
    "preference/loss": "pref",
    "preference/kept": "kept",
}
"""The few figures of a progress line."""


def run_job(config: Config) -> int:
    """Train until done or interrupted, resuming what is there; returns the exit code (0, 130 or 143).

    Raises ValueError for a run folder or checkpoint that cannot be used; other exceptions mean that the run failed.
    """
    directory = RunDirectory.prepare(config.run.dir, config.run.name, config.model_dump(mode="json"))
    done = steps_done(directory)
    if done >= config.steps and (directory.path / "report.json").is_file():
        print(f"{directory.path} is finished ({done} steps); raise steps to go on, or choose another run.name")
        return 0
    with (
        Tracker(directory, config.tracking, after_step=done) as tracker,
        Progress(config.steps, done) as progress,
        Interruption(progress.notice) as stop,
    ):
        progress.say(f"resuming after step {done}" if done else f"starting {directory.path}")

        def attempt(runtime: Runtime) -> None:
            run = TrainingRun(config, directory, runtime, tracker, progress, stop)
            run.restore()
            train(config, runtime, build_images(config.data, config.seed), run)

        if done < config.steps:
            run_supervised(attempt, lambda: build_runtime(config, say=progress.say), config.deadlines.attempts)
        if steps_done(directory) < config.steps:
            tracker.finish("interrupted")
            return stop.exit_code
        report(config, directory, tracker, progress.say)
    return 0


def steps_done(directory: RunDirectory) -> int:
    """Steps behind the newest complete checkpoint."""
    checkpoint = latest_checkpoint(directory.checkpoints)
    return int(read_state(checkpoint)["step"]) if checkpoint else 0


class TrainingRun:
    """The loop's other half: which steps are left, and what is kept of each. One per attempt."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        runtime: Runtime,
        tracker: Tracker,
        progress: Progress,
        stop: Interruption,
    ) -> None:
        self.config = config
        self.directory = directory
        self.runtime = runtime
        self.tracker = tracker
        self.progress = progress
        self.stop = stop
        self.done = 0
        self.counters = {"generator_updates": 0, "score_updates": 0, "preference_updates": 0, "samples": 0}
        self.seconds = 0.0
        self._started = time.monotonic()
        self._sheet = SampleSheet(config, load_family(config.model))

    def restore(self) -> None:
        """Load every role from the newest complete checkpoint, if there is one."""
        checkpoint = latest_checkpoint(self.directory.checkpoints)
        if checkpoint is None:
            self.tracker.rewind(0)
            return
        state = read_state(checkpoint)
        for role in (self.runtime.generator, self.runtime.score, self.runtime.discriminator):
            role.load(checkpoint)
        self.done, self.counters, self.seconds = state["step"], state["counters"], state["seconds"]
        self.tracker.rewind(self.done)  # steps after the checkpoint will be done, and recorded, again

    def steps(self) -> Iterator[int]:
        """From the first step not yet done until the last, or until a signal asks to stop."""
        while self.done < self.config.steps and not self.stop.requested:
            yield self.done

    def finish(self, step: int, metrics: Metrics) -> None:
        """Count, record, show; then the sample sheet and the checkpoint when due."""
        self.done = step + 1
        self._count(metrics)
        last = self.done == self.config.steps
        if last or self.done % self.config.tracking.log_every == 0:
            self.tracker.metrics(self.done, metrics | {f"count/{name}": value for name, value in self.counters.items()})
        self.progress.step(self.done, {label: metrics[name] for name, label in SHOWN.items() if name in metrics})
        if last or self.done % self.config.tracking.samples_every == 0:
            path = self._sheet.write(
                self.runtime.generator.weights(), self.directory.samples / f"step-{self.done:06d}.png"
            )
            self.tracker.image("samples", path, self.done)
        if last or self.stop.requested or self.done % self.config.checkpoint.every == 0:
            self._checkpoint()

    def _count(self, metrics: Metrics) -> None:
        if self.config.preference.distill:
            self.counters["generator_updates"] += 1
            self.counters["score_updates"] += self.config.ttur
            self.counters["samples"] += self.config.batch
        self.counters["preference_updates"] += int(metrics.pop("preference/updates", 0))

    def _checkpoint(self) -> None:
        now = time.monotonic()
        self.seconds, self._started = self.seconds + now - self._started, now
        roles = (self.runtime.generator, self.runtime.score, self.runtime.discriminator)
        state = {"step": self.done, "counters": self.counters, "seconds": self.seconds}
        write_checkpoint(
            self.directory.checkpoints,
            self.done,
            *(role.save for role in roles),
            state=state,
            keep=self.config.checkpoint.keep,
        )
