"""The real roles on the shipped weights: the Ray runtime gives the bits of the local one, so what is debugged here runs there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.results.sample_grid import SampleGrid
from flashdmd_ray.runtime import build_runtime

STEPS = 2
SMALL = ["batch=4", "ttur=2", "preference.updates=1", "preference.batch=4", "preference.candidates=2"]


class Recorded:
    """What the loop reports, kept."""

    preference_rate = 1.0

    def __init__(self) -> None:
        self.metrics: list[Metrics] = []

    def steps(self) -> Iterable[int]:
        return range(STEPS)

    def finish(self, step: int, metrics: Metrics) -> None:
        self.metrics.append(metrics)


def run(runtime_name: str, *settings: str, grid: Path | None = None) -> tuple[list[Metrics], dict[str, Tensor]]:
    """The metrics of each step and the weights. grid: where to write a sample grid after them."""
    config = load_config(None, [f"runtime={runtime_name}", *SMALL, *settings])
    runtime = build_runtime(config)
    try:
        recorded = Recorded()
        train(config, runtime, build_images(config.data, config.seed), recorded)
        if grid is not None:
            SampleGrid(config, runtime).write(grid)
        return recorded.metrics, runtime.generator.weights()
    finally:
        runtime.close()


def without_pools(steps: list[Metrics]) -> list[Metrics]:
    return [{name: value for name, value in step.items() if not name.startswith("pool/")} for step in steps]


@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_is_bit_identical_on_ray(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red 4\ntwo 7s\n")
    few = [f"evaluation={{prompts: {tmp_path / 'prompts.txt'}, teacher_steps: 2, ema: 0.5}}", f"data.cache={tmp_path}"]
    pictures = tmp_path / "here.png", tmp_path / "there.png"
    threads = torch.get_num_threads()
    try:
        (here, mine), (there, theirs) = run("local", *few, grid=pictures[0]), run("ray", *few, grid=pictures[1])
    finally:
        torch.set_num_threads(threads)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert len(here) == STEPS
    assert "preference/loss" in here[-1]
    assert here == without_pools(there)
    assert there[-1]["pool/rollout/workers"] == there[-1]["pool/reward/workers"] == 1
    assert there[-1]["preference/groups"] == there[-1]["preference/scored"] == 4
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


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
    here, mine = run("ray", *ranks, "placement.discriminator.workers=2")
    there, theirs = run("ray", *ranks, *(f"placement.{group}.within=learner" for group in groups))
    assert without_pools(here) == there
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(".lora_" in name for name in mine)
