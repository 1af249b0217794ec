"""DeepSpeed under the runtimes: two learner ranks share out the optimizer and train what one rank with plain torch trains."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from toy_roles import TOYS, toy_config

from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.roles.networks import Metrics
from flashdmd_ray.runtime import build_runtime

STEPS = 2
ROOTS = ("matching/real_fake_gap", "matching/real_generated_gap", "generator/latent_std")
"""Roots of a rank's own means: their mean over two ranks is not the figure of the whole batch."""
SMALL = ["batch=4", "preference.updates=0", "generator.warmup=0", "score.warmup=0", "deadlines.start_s=1200"]
ZERO = ["runtime=ray", "placement.learner.workers=2", "engine.kind=deepspeed", "engine.zero_stage=2"]


class Quiet:
    def steps(self) -> Iterable[int]:
        return range(STEPS)

    def finish(self, step: int, metrics: Metrics) -> None:
        self.last = metrics


def trained(*settings: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Metrics]:
    """The generator's weights before and after, and the last step's metrics."""
    config = load_config(None, [*SMALL, *settings])
    runtime = build_runtime(config)
    try:
        start, run = runtime.generator.weights(), Quiet()
        train(config, runtime, build_images(config.data, config.seed), run)
        return start, runtime.generator.weights(), run.last
    finally:
        runtime.close()


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_of_zero_2_equal_plain_torch() -> None:
    threads = torch.get_num_threads()
    try:
        start, plain, metrics = trained("runtime=local")
    finally:
        torch.set_num_threads(threads)
    same_start, sharded, sharded_metrics = trained(*ZERO)
    for found in (metrics, sharded_metrics):
        assert all(found.pop(name) > 0 for name in ROOTS)
    assert sharded_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    moved, apart = 0.0, 0.0
    for name, weights in plain.items():
        assert torch.equal(start[name], same_start[name])
        torch.testing.assert_close(sharded[name], weights, rtol=0, atol=1e-5)
        moved += (weights - start[name]).square().sum().item()
        apart += (weights - sharded[name]).square().sum().item()
    assert apart**0.5 < 0.02 * moved**0.5


def test_a_second_local_runtime_in_one_process() -> None:
    for _ in range(2):
        runtime = build_runtime(toy_config("local", engine__kind="deepspeed"), TOYS)
        runtime.close()
