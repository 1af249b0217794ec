"""A latent reward under Ray Train: two gloo ranks, a job that is stopped and gone on with, a rank that is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from flashdmd_ray.reward_training import job
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.job import run_reward_training
from flashdmd_ray.reward_training.worker import run_worker
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.runtime.ray_train import RayTrainContext
from tests.reward_training.conftest import configure, teacher  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("ray_cluster")
STEPS, EVERY = 24, 4


@pytest.fixture
def on_ray(configure) -> Callable[[str], RewardTrainingConfig]:  # noqa: F811 (a fixture)
    def make(name: str, **sections) -> RewardTrainingConfig:
        settings = {
            "runtime": "ray",
            "steps": STEPS,
            "workers": {"workers": 2},
            "checkpoint": {"every": EVERY, "keep": 2},
        }
        return configure(name, **(settings | sections))

    return make


def when_at(config: RewardTrainingConfig, step: int, act: Callable[[], None]) -> threading.Thread:
    """Do `act` in a thread as soon as so many steps are recorded, before the last one is."""
    metrics = config.run.dir / config.run.name / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            done = max((record["step"] for record in read_metrics(metrics)), default=0)
            if done >= step:
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def train_workers() -> list[psutil.Process]:
    """Worker processes of Ray Train among our own descendants, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that has just ended
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def result(config: RewardTrainingConfig) -> Path:
    return config.run.dir / config.run.name / "latent_reward"


def trains_and_refuses(config: RewardTrainingConfig, source: str, folder: Path, context: RayTrainContext) -> None:
    run_worker(config, source, folder, context)
    if context.rank == 1:
        raise FloatingPointError("rank 1: the loss is not finite")


def test_a_job_that_is_stopped_and_loses_a_rank_ends_with_the_same_model_to_the_bit(on_ray, monkeypatch) -> None:
    """A job that was stopped and lost a rank equals an undisturbed one. A worker's error comes back from that one as it was raised."""
    whole, hurt = on_ray("whole"), on_ray("hurt")
    with monkeypatch.context() as patch:
        patch.setattr(job, "run_worker", trains_and_refuses)
        with pytest.raises(FloatingPointError, match=r"^rank 1: the loss is not finite$"):
            run_reward_training(whole)

    when_at(hurt, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_reward_training(hurt) == 143
    stopped = read_metrics(hurt.run.dir / "hurt" / "metrics.jsonl")[-1]["step"]
    assert 5 <= stopped < STEPS
    assert (hurt.run.dir / "hurt" / "checkpoints" / f"step-{stopped:08}" / "state.safetensors").is_file()

    killed: list[int] = []

    def kill_one() -> None:
        victim = train_workers()[-1]
        victim.kill()
        killed.append(victim.pid)

    when_at(hurt, stopped + 1, kill_one)
    assert run_reward_training(hurt) == 0
    assert killed, "no worker was there to be killed"
    ours, theirs = (load_file(result(c) / "model.safetensors") for c in (hurt, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [read_metrics(c.run.dir / c.run.name / "metrics.jsonl") for c in (hurt, whole)]
    assert records[0] == records[1]
