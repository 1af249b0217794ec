"""One joint training job from start to end: run folder, resume, the loop, then the table, the grid and the export."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator

from flashdmd_ray import ranking
from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import (
    Best,
    explain_damage,
    latest_checkpoint,
    latest_step,
    manifests,
    newest_healthy,
    open_store,
    read_state,
)
from flashdmd_ray.config import Config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.monitor import SEVERITY, HackMonitor
from flashdmd_ray.results.report import report
from flashdmd_ray.results.sample_sheet import SampleSheet
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.run.settings import SECOND_STAGE, changed_settings, fixed_settings, without
from flashdmd_ray.run.storage import Location, checkpoint_root
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.runtime.build import build_runtime
from flashdmd_ray.runtime.control import open_control
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.runtime.supervisor import Supervisor
from flashdmd_ray.training.beta_check import BetaCheck
from flashdmd_ray.training.checkpoint_saver import CheckpointSaver
from flashdmd_ray.training.data_report import note_replaced, start_report
from flashdmd_ray.training.monitor_pictures import FOLDER, Evidence

log = logging.getLogger(__name__)

STOPPED_BY_MONITOR = 3
"""Exit code of a run that its hack monitor ended."""

SHOWN = {
    "matching/real_fake_gap": "gap",
    "discriminator/accuracy_real": "D real",
    "discriminator/accuracy_fake": "D fake",
    "preference/kept": "kept",
    "preference/beta_h": "|beta H|",
}
"""Figures of every progress line; `shown_figures` adds the rewards."""


def run_job(config: Config) -> int:
    """Train until done, interrupted or stopped by the hack monitor, resuming what is there; returns the exit code (0, 130, 143 or 3).

    Raises ValueError for a run folder or checkpoint that cannot be used; other exceptions mean that the run failed.
    """
    directory = RunDirectory.prepare(config.run, config)
    root = checkpoint_root(config, directory.path)
    done = latest_step(root)
    if done >= config.steps and (directory.path / "report.json").is_file():
        print(f"{directory.path} is finished ({done} steps); raise steps to go on, or choose another run.name")
        return 0
    latest_checkpoint(root)  # a damaged one is refused before anything starts
    data = build_images(config.data, config.seed)  # and so is unusable data
    found = start_report(directory.path, config.data)
    with (
        Tracker(directory, config.tracking, after_step=done) as tracker,
        Progress(config.steps, done) as progress,
        Interruption(progress.notice) as stop,
    ):
        progress.say(f"resuming after step {done}" if done else f"starting {directory.path}")

        def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> bool:
            run = TrainingRun(config, directory, runtime, tracker, progress, stop, found)
            run.restore()
            loaded(run.done)
            with run.saver, open_control(config.control, runtime.pools, directory.control):
                train(config, runtime, data, run)
            return run.monitor.wants_stop

        supervisor = Supervisor(config.deadlines, lambda: latest_step(root), lambda: stop.requested)
        hacked = done < config.steps and supervisor.run(
            attempt, lambda previous: build_runtime(config, say=progress.say, previous=previous)
        )
        if latest_step(root) < config.steps:
            tracker.finish("interrupted")
            if hacked:
                progress.say(how_to_go_on(directory, root))
            return STOPPED_BY_MONITOR if hacked else stop.exit_code
        report(config, directory, tracker, progress.say)
    return 0


def how_to_go_on(directory: RunDirectory, root: Location) -> str:
    """The last line of a run that the hack monitor stopped."""
    healthy = newest_healthy(manifests(root))
    kept = (
        "no checkpoint was written before"
        if healthy is None
        else f"{healthy.folder.name} is healthy: jobs/export.py {directory.path} --checkpoint healthy"
    )
    return f"stopped by the hack monitor (monitor.action); {kept}; with monitor.action=report the same command goes on"


def shown_figures(config: Config) -> dict[str, str]:
    """Names of the metrics of a progress line, with their labels: the first optimised reward and the first held-out one before the rest."""
    if not config.preference.updates:
        return SHOWN
    first = {reward.held_out: reward.label for reward in reversed(config.rewards)}
    return {
        f"reward/{label}": f"{label} (held out)" if held_out else label for held_out, label in sorted(first.items())
    } | SHOWN


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
        found: Metrics,
    ) -> None:
        """found: what is known of the data, recorded with every step."""
        self.config = config
        self.found = found
        self.directory = directory
        self.runtime = runtime
        self.tracker = tracker
        self.progress = progress
        self.stop = stop
        self.done = 0
        self.counters = {"generator_updates": 0, "score_updates": 0, "preference_updates": 0, "samples": 0}
        self.seconds = 0.0
        self._started = time.monotonic()
        self._judged: list[float] = []  # values of checkpoint.best_metric since the last checkpoint
        self._root = checkpoint_root(config, directory.path)
        self._settings = fixed_settings(Config, config.model_dump(mode="json"), ("checkpoint",))
        self.saver = CheckpointSaver(
            open_store(self._root, self._mark(), config.checkpoint.keep, Best.from_config(config.checkpoint)),
            (runtime.generator, runtime.score, runtime.discriminator),
            config.checkpoint.asynchronous,
            config.deadlines.checkpoint_s,
        )
        self._shown, self._beta = shown_figures(config), BetaCheck(config.preference.beta)
        self._sheet = SampleSheet(config, runtime)
        self.monitor = HackMonitor(
            config.monitor, config.optimised_rewards, [reward.label for reward in config.rewards if reward.held_out]
        )
        self._evidence = Evidence(directory.path / FOLDER, self._sheet, config.sampling.timesteps)

    def restore(self) -> None:
        """Load every role from the newest complete checkpoint, if there is one. Raises ValueError when it is of another run."""
        checkpoint = latest_checkpoint(self._root)
        if checkpoint is None:
            self.tracker.rewind(0)
            return
        state = read_state(checkpoint)
        unused = () if state["counters"]["preference_updates"] else SECOND_STAGE
        saved, new = (without(settings, unused) for settings in (state.get("settings", self._settings), self._settings))
        if changes := changed_settings(saved, new):
            raise ValueError(
                f"checkpoint {checkpoint} was written with another configuration ({changes}); "
                "choose another run.name, or restore the value to resume"
            )
        preference = self.config.preference
        if unused and preference.updates and preference.start_step < state["step"]:
            raise ValueError(
                f"preference.start_step: this run has made {state['step']} steps without preference updates, and the reference policy is "
                f"frozen at the first of them; set it to {state['step']} or later"
            )
        with explain_damage(self._root):
            for role in self.saver.roles:
                role.load(checkpoint)
        self.done, self.counters, self.seconds = state["step"], state["counters"], state["seconds"]
        self.monitor.load(state["monitor"])
        self.tracker.rewind(self.done)  # steps after the checkpoint will be done, and recorded, again

    def steps(self) -> Iterator[int]:
        """From the first step not yet done until the last, or until a signal or the hack monitor asks to stop."""
        while self.done < self.config.steps and not (self.stop.requested or self.monitor.wants_stop):
            if self.config.monitor_enabled and self.done == self.config.preference.start_step:
                self._evidence.keep_start()
            yield self.done

    @property
    def preference_rate(self) -> float:
        return self.monitor.preference_rate

    def finish(self, step: int, metrics: Metrics) -> None:
        """Count, record, show; then the sample sheet and the checkpoint when due. Raises CheckpointError for one that failed meanwhile."""
        self.saver.check()
        self.done = step + 1
        metrics = metrics | self._watch(metrics)
        self._judged.append(metrics.get(self.config.checkpoint.best_metric or "", math.nan))
        self._count(metrics)
        last = self.done == self.config.steps
        if last or self.done % self.config.tracking.log_every == 0:
            counted = {f"count/{name}": value for name, value in self.counters.items()}
            self.tracker.metrics(self.done, metrics | counted | self.found)
        for line in ranking.summary(metrics):
            self.progress.say(line)
        if (warning := self._beta.observe(metrics)) is not None:
            log.warning(warning)
        self.progress.step(self.done, {label: metrics[name] for name, label in self._shown.items() if name in metrics})
        if last or self.done % self.config.tracking.samples_every == 0:
            path = self._sheet.write(self.directory.samples / f"step-{self.done:06d}.png")
            self.tracker.image("samples", path, self.done)
        due = last or self.stop.requested or self.done % self.config.checkpoint.every == 0
        if due and not self.monitor.wants_stop:
            self._checkpoint()

    def _watch(self, metrics: Metrics) -> Metrics:
        """What the hack monitor makes of the step; what is new goes to the log, with pictures when the verdict got worse."""
        figures, news = self.monitor.observe(self.done, metrics)
        for event in news:
            self.progress.say(f"hack monitor, step {event.step}: {event.message}")
            self.tracker.tag("hack_monitor", f"step {event.step}: {event.message}")
            if event.worse:
                self.tracker.image("hack_monitor", self._evidence.write(event.step), event.step)
        return figures

    def _count(self, metrics: Metrics) -> None:
        if self.config.preference.distill:
            self.counters["generator_updates"] += 1
            self.counters["score_updates"] += self.config.ttur
            self.counters["samples"] += self.config.batch
        self.counters["preference_updates"] += int(metrics.pop("preference/updates", 0))

    def _checkpoint(self) -> None:
        note_replaced(self.directory.path, self.runtime.discriminator.data_report())
        now = time.monotonic()
        self.seconds, self._started = self.seconds + now - self._started, now
        state = {
            "step": self.done,
            "counters": dict(self.counters),
            "seconds": self.seconds,
            "settings": self._settings,
            "monitor": self.monitor.state(),
        }
        severity = {SEVERITY: float(self.monitor.verdict.severity)} if self.config.monitor_enabled else {}
        self.saver.save(self.done, state, self._mean_metric() | severity)

    def _mean_metric(self) -> dict[str, float]:
        """`checkpoint.best_metric` over the steps since the last checkpoint; warns when none of them had it."""
        name, values = self.config.checkpoint.best_metric, [value for value in self._judged if math.isfinite(value)]
        self._judged = []
        if name is None:
            return {}
        if not values:
            log.warning("checkpoint.best_metric: no step since the last checkpoint has a finite '%s'", name)
            return {}
        return {name: math.fsum(values) / len(values)}

    def _mark(self) -> str:
        """Tells this run's checkpoints from those of another run in the same place."""
        facts = json.dumps([self.config.run.name, without(self._settings, SECOND_STAGE)], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:12]
