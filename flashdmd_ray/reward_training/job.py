"""One job from start to end: run folder, pairs, training on one process or under Ray Train, the table."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from flashdmd_ray.reward_training.accuracy import table
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.local_context import LocalContext
from flashdmd_ray.reward_training.pairs import open_pair_data
from flashdmd_ray.reward_training.prepare import prepare_pairs
from flashdmd_ray.reward_training.result import ACCURACY, FOLDER
from flashdmd_ray.reward_training.worker import METRICS, load_spaces, run_worker
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.lock import hold
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.run.progress import Progress

CHECKPOINTS = "checkpoints"
POLL_S = 0.3
Act = Callable[[], None]


def run_reward_training(config: RewardTrainingConfig) -> int:
    """Train until done or interrupted, resuming what is there; returns the exit code (0, 130 or 143).

    Raises ValueError for a run folder, pairs or models that cannot be used; other exceptions mean that the job failed.
    """
    directory = RunDirectory.prepare(config.run, config)
    with hold(directory.path):
        directory.reopen(config)
        return _train_and_report(config, directory)


def _train_and_report(config: RewardTrainingConfig, directory: RunDirectory) -> int:
    result = directory.path / FOLDER
    if (result / ACCURACY).is_file():
        print(f"{directory.path} is finished; choose another run.name to train again")
        return 0
    done = _last_step(directory.path)
    with Progress(config.steps, done) as progress, Interruption(progress.notice) as stop:
        progress.say(f"resuming after step {done} or a checkpoint before" if done else f"starting {directory.path}")
        source = prepare_pairs(config, directory.path / "pairs", lambda: _load_models(config), progress.say)
        if not stop.requested:
            open_pair_data(
                config.pairs, source, (8, 8), config.seed
            )  # unusable pairs are refused before anything starts
            _train(config, source, directory.path, stop, progress)
        if not (result / ACCURACY).is_file():
            progress.say("stopped; the same command goes on from here")
            return stop.exit_code
        report = json.loads((result / ACCURACY).read_text())
        progress.say(f"{result} written")
    print("\n".join(["", *table(report)]))
    return stop.exit_code


def _load_models(config: RewardTrainingConfig):  # type: ignore[no-untyped-def]
    return (
        load_spaces(config).load(("denoiser",))
        if config.pairs.source in ("teacher", "student")
        else load_spaces(config)
    )


def _train(config: RewardTrainingConfig, source: str, folder: Path, stop: Interruption, progress: Progress) -> None:
    """In a thread, so that this one can watch the signals and the record of steps."""
    failed: list[BaseException] = []
    with _runner(config, source, folder) as (send_stop, work):

        def run() -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="training", daemon=True)
        thread.start()
        stop_sent, shown = False, _last_step(folder)
        while thread.is_alive():
            thread.join(POLL_S)
            if stop.requested and not stop_sent:
                send_stop()
                stop_sent = True
            shown = _show(folder / METRICS, shown, progress)
    if failed:
        raise failed[0]


@contextmanager
def _runner(config: RewardTrainingConfig, source: str, folder: Path) -> Iterator[tuple[Act, Act]]:
    """(ask to stop, do the work) of the configured runtime."""
    if config.runtime == "local":
        context = LocalContext(folder / CHECKPOINTS, config.checkpoint.keep)
        yield context.stop, lambda: run_worker(config, source, folder, context)
        return
    from flashdmd_ray.runtime.environment import use_loopback

    use_loopback(os.environ)
    from flashdmd_ray.runtime.ray_train import TrainSettings, ray_train, request_stop

    storage, limits, group = folder.absolute(), config.deadlines, config.workers
    settings = TrainSettings(
        storage,
        group.workers,
        group.cpus,
        group.gpus,
        config.threads,
        limits.start_s,
        limits.collective_s,
        limits.attempts,
        config.checkpoint.keep,
    )
    with ray_train(settings) as run:
        yield lambda: request_stop(storage), lambda: run(partial(run_worker, config, source, storage))


def _last_step(folder: Path) -> int:
    records = read_metrics(folder / METRICS)
    return records[-1]["step"] if records else 0


def _show(path: Path, shown: int, progress: Progress) -> int:
    for record in read_metrics(path):
        if record["step"] > shown:
            shown = record["step"]
            progress.step(shown, {name: record[name] for name in ("loss", "accuracy")})
    return shown
