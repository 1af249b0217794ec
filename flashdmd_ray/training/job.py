"""One joint training job from start to end: run folder, resume, the loop, then the table, the grid and the export."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import latest_step, manifests, newest_healthy, newest_whole
from flashdmd_ray.config import Config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.lock import Lock, hold_run
from flashdmd_ray.run.progress import Progress, still
from flashdmd_ray.run.storage import Location, checkpoint_root
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.runtime.build import build_runtime
from flashdmd_ray.runtime.control import open_control
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.runtime.supervisor import Supervisor
from flashdmd_ray.training.data_report import start_report
from flashdmd_ray.training.observer import Observer
from flashdmd_ray.training.progress_line import legend
from flashdmd_ray.training.training_run import TrainingRun

STOPPED_BY_MONITOR = 3
"""Exit code of a run that its hack monitor ended."""


def run_job(config: Config) -> int:
    """Train until done, interrupted or stopped by the hack monitor, resuming what is there; returns the exit code (0, 130, 143 or 3).

    Raises ValueError for a run folder or checkpoint that cannot be used; other exceptions mean that the run failed.
    """
    directory = RunDirectory.prepare(config.run, config)
    root = checkpoint_root(config, directory.path)
    with hold_run(directory.path, root) as lock:
        directory.reopen(config)
        done = latest_step(root)
        if done < config.steps or not (directory.path / "report.json").is_file():
            return _train(config, directory, root, lock)
    print(f"{directory.path} is finished ({done} steps); raise steps to go on, or choose another run.name")
    print(what_next(config, directory))
    return 0


def _train(config: Config, directory: RunDirectory, root: Location, lock: Lock) -> int:
    print("reading checkpoints and data", flush=True)
    with still(partial(print, flush=True), lambda: "still reading checkpoints and data"):
        newest_whole(root, config.checkpoint.on_damage)  # a damaged one is set aside or refused before anything starts
        done = latest_step(root)
        data = build_images(config.data, config.seed)  # and so is unusable data
        data_counts = start_report(directory.path, config.data)
    with (
        Tracker(directory, config.tracking, after_step=done) as tracker,
        Progress(config.steps, done) as progress,
        Interruption(progress.notice, config.deadlines.stop_s) as stop,
    ):
        progress.say(f"resuming after step {done}" if done else f"starting {directory.path}")
        progress.say(legend(config))

        def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> bool:
            """Train from the newest checkpoint on; returns whether the hack monitor stopped it."""
            run = TrainingRun(config, directory, runtime, tracker, progress, stop, data_counts)
            run.observers.insert(0, StillAlone(lock))
            run.restore()
            loaded(run.done)
            with run.checkpoints.saver, open_control(config.control, runtime.pools, directory.control):
                train(config, runtime, data, run)
            return run.watch.monitor.wants_stop

        supervisor = Supervisor(config.deadlines, lambda: latest_step(root), lambda: stop.requested)
        hacked = done < config.steps and supervisor.run(
            attempt, lambda previous: build_runtime(config, say=progress.say, previous=previous)
        )
        if latest_step(root) < config.steps:
            tracker.finish("interrupted")
            if hacked:
                progress.say(how_to_go_on(directory, root))
            return STOPPED_BY_MONITOR if hacked else stop.exit_code
        progress.say("all steps are done: loading libraries for the results")
        # Until here the workers alone need diffusers and transformers, and importing them would delay the first step.
        with still(progress.say, lambda: "still loading libraries"):
            from flashdmd_ray.results.report import report

        report(config, directory, tracker, progress.say)
        progress.say(what_next(config, directory))
    return 0


class StillAlone(Observer):
    """Ends the run when another job has taken over its folder or the place of its checkpoints."""

    def __init__(self, lock: Lock) -> None:
        self._lock = lock

    def after_step(self, done: int, metrics: Metrics) -> None:
        self._lock.check()


def what_next(config: Config, directory: RunDirectory) -> str:
    """The last line of a finished run: what to do with its student."""
    adapter = f"; as an adapter: flashdmd export {directory.path} --format lora" if config.lora.networks else ""
    elsewhere = adapter or f"; for ComfyUI: flashdmd export {directory.path} --single-file"
    return f"next: look at {directory.path / 'report.html'}; serve it: flashdmd serve {directory.path}{elsewhere}"


def how_to_go_on(directory: RunDirectory, root: Location) -> str:
    """The last line of a run that the hack monitor stopped."""
    healthy = newest_healthy(manifests(root))
    saved = (
        "no checkpoint was written before"
        if healthy is None
        else f"{healthy.folder.name} is healthy: flashdmd export {directory.path} --checkpoint healthy"
    )
    return f"stopped by the hack monitor (monitor.action); {saved}; with monitor.action=report the same command goes on"
