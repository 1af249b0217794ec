"""The real roles on the shipped weights: the Ray runtime gives the bits of the local one, so what is debugged here runs there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors
from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import Interruption
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.run.progress import Progress
from flashdmd_ray.run.tracking import Tracker
from flashdmd_ray.runtime import build_runtime
from flashdmd_ray.runtime.call_times import CallTimes, Spent
from flashdmd_ray.training.data_report import start_report
from flashdmd_ray.training.step_times import MEASURED, StepTimes
from flashdmd_ray.training.training_run import TrainingRun
from tests.metrics_page import undocumented, unwritten

STEPS = 2
SMALL = ["batch=4", "ttur=2", "preference.updates=1", "preference.batch=4", "preference.candidates=2"]
ALL_METRICS = ["monitor.every=1", "monitor.warmup=1", "monitor.window=1", "tracking.enabled=false", f"steps={STEPS}"]


class Recorded:
    """What the loop reports, kept."""

    preference_rate = 1.0

    def __init__(self) -> None:
        self.metrics: list[Metrics] = []

    def steps(self) -> Iterable[int]:
        return range(STEPS)

    def finish(self, step: int, metrics: Metrics) -> None:
        self.metrics.append(metrics)


def run(*settings: str) -> tuple[list[Metrics], dict[str, Tensor]]:
    config = load_config(None, ["runtime=ray", *SMALL, *settings])
    runtime = build_runtime(config)
    try:
        recorded = Recorded()
        train(config, runtime, build_images(config.data, config.seed), recorded)
        return recorded.metrics, runtime.generator.weights()
    finally:
        runtime.close()


def run_in(folder: Path, runtime_name: str) -> Path:
    """A run with its records, pictures, checkpoint and the trace of its second step; returns its folder."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red 4 on a gray background\na blue 3 on a white background\n")
    place = [f"runtime={runtime_name}", f"run.dir={folder}", f"run.name={runtime_name}", f"data.prompts={prompts}"]
    pictures = f"evaluation={{prompts: {prompts}, teacher_steps: 2, ema: 0.5}}"
    config = load_config(None, [*place, *SMALL, *ALL_METRICS, pictures, "profile.steps=[2]"])
    directory = RunDirectory.prepare(config.run, config)
    data_counts = start_report(directory.path, config.data)
    runtime = build_runtime(config)
    try:
        with (
            Tracker(directory, config.tracking, after_step=0) as tracker,
            Progress(config.steps) as progress,
            Interruption(progress.notice) as stop,
        ):
            following = TrainingRun(config, directory, runtime, tracker, progress, stop, data_counts)
            with following.checkpoints.saver:
                train(config, runtime, build_images(config.data, config.seed), following)
    finally:
        runtime.close()
    return directory.path


def repeatable(steps: list[Metrics]) -> list[Metrics]:
    return [{name: value for name, value in step.items() if not name.startswith(MEASURED)} for step in steps]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Path]:
    """The same run in one process and on Ray."""
    threads, folder = torch.get_num_threads(), tmp_path_factory.mktemp("runs")
    try:
        return run_in(folder, "local"), run_in(folder, "ray")
    finally:
        torch.set_num_threads(threads)


def test_the_demo_is_bit_identical_on_ray(runs: tuple[Path, Path]) -> None:
    here, there = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert len(here) == STEPS
    assert "preference/loss" in here[-1]
    assert repeatable(here) == repeatable(there)
    assert there[-1]["pool/rollout/workers"] == there[-1]["pool/reward/workers"] == 1
    assert there[-1]["preference/groups"] == there[-1]["preference/scored"] == 4
    here, there = (run / "samples" / f"step-{STEPS:06d}.png" for run in runs)
    assert here.read_bytes() == there.read_bytes()
    mine, theirs = (load_tensors(latest_checkpoint(run / "checkpoints") / "generator.safetensors") for run in runs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_metric_is_explained_and_every_explained_one_is_written(runs: tuple[Path, Path], tmp_path: Path) -> None:
    names = {name for run in runs for record in read_metrics(run / "metrics.jsonl") for name in record}
    names |= figures_of_a_gpu(tmp_path).keys()
    assert undocumented(names) == []
    assert unwritten(names) == []


def figures_of_a_gpu(folder: Path) -> Metrics:
    """A step of 2 s on a GPU with known operations, without the GPU."""
    config, times, metrics = load_config(None, ["runtime=local", "placement.learner.gpus=1"]), CallTimes(), {}
    follower = StepTimes(config, times, folder)
    follower.before_step(0)
    times.add("learner", "generator", "generate", [Spent(0.5, 0.0, 2**31, "NVIDIA H100 80GB HBM3")], None)
    follower.after_step(1, metrics)
    assert metrics["memory/learner"] == 2
    assert metrics["time/generator/generate"] == 0.5
    # 40 % of the peak for so many seconds is what the plan would need for these operations
    assert 0 < metrics["speed/mfu"] * metrics["time/step"] * 989e12 < 1e13
    return metrics


def test_each_call_of_a_profiled_step_has_a_trace(runs: tuple[Path, Path]) -> None:
    for run in runs:
        (step,) = (run / "profile").iterdir()
        traces = {path.name.partition("-")[0] for path in step.iterdir()}
        assert step.name == "step-000002"
        assert {"generator.generate", "score.denoising_step", "discriminator.step"} < traces
        assert {"rollouts.candidates", "rewards.reward.score"} < traces
        events = json.loads(gzip.decompress((step / "generator.generate-1.json.gz").read_bytes()))["traceEvents"]
        assert any("conv" in event.get("name", "") for event in events)


@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_that_hold_all_roles_end_with_the_bits_of_separate_processes() -> None:
    """With adapters, the parts of the network that are published then."""
    ranks = [
        "lora={networks: [generator, score], rank: 4}",
        "placement.learner.workers=2",
        "engine.kind=deepspeed",
        "engine.zero_stage=2",
    ]
    groups = ("discriminator", "rollout", "reward")
    here, mine = run(*ranks, "placement.discriminator.workers=2")
    there, theirs = run(*ranks, *(f"placement.{group}.within=learner" for group in groups))
    assert repeatable(here) == there
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(".lora_" in name for name in mine)
