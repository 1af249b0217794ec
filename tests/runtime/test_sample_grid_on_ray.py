"""Sample grids from workers that share a network: the pixels of the local runtime. (One worker: test_demo_on_ray.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flashdmd_ray.batch import Prompts
from flashdmd_ray.config import parse_config
from flashdmd_ray.results.sample_grid import SampleGrid
from flashdmd_ray.runtime import build_runtime
from flashdmd_ray.runtime.build import ROLES
from tests.levels import levels
from tests.tiny import save_sdxl

LEARNER = {"learner": ROLES["learner"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("teacher"))


def drawn(teacher: Path, folder: Path, runtime: str, workers: int = 1, **engine: object) -> Tensor:
    """The student's row of a grid that is written, after two updates that the average follows."""
    (folder / "prompts.txt").write_text("a red 4\ntwo 7s\na blue 1\n")
    tree = {
        "runtime": runtime,
        "model": {"teacher": str(teacher)},
        "generator": {"warmup": 0, "lr": 1e-3},
        "engine": engine,
        "placement": {"learner": {"workers": workers}},
        "data": {"cache": str(folder / "cache")},
        "evaluation": {"ema": 0.5, "batch": 2, "teacher_steps": 2, "prompts": str(folder / "prompts.txt")},
        "deadlines": {"start_s": 500, "call_s": 500},
    }
    config = parse_config(tree)
    roles = build_runtime(config, LEARNER)
    try:
        prompts = Prompts(("a red 4", "two 7s", "a", "b"), torch.arange(4))
        for seed in range(2):
            roles.generator.generate(prompts, levels(prompts, 1), seed)
            roles.generator.distillation_step(torch.ones(4, 4, 8, 8), torch.ones(4, 4, 8, 8))
            roles.generator.update_ema()
        grid = SampleGrid(config, roles)
        before = roles.generator.weights()
        grid.write(folder / "grid.png")
        row = roles.generator.generate_images(grid.prompts, config.sampling.timesteps, grid.seed)[: len(grid.texts)]
        after = roles.generator.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return row
    finally:
        roles.close()


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_does_not_depend_on_who_generates_it(teacher, tmp_path):
    threads = torch.get_num_threads()
    try:
        row = drawn(teacher, tmp_path, "local")
        shared = drawn(teacher, tmp_path, "ray", workers=2, kind="deepspeed", zero_stage=3)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(shared, row, rtol=0, atol=0.02)
