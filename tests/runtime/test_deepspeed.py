"""DeepSpeed under the runtimes: two learner ranks share out the optimizer, train what one rank with plain torch trains, and
take up its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_roles import TOYS, toy_config

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.runtime import build_runtime

STEPS, RATE = 2, 3e-5
ROOTS = ("matching/real_fake_gap", "matching/real_generated_gap", "generator/latent_std")
"""Roots of a rank's own means: their mean over two ranks is not the figure of the whole batch."""
SMALL = [
    "batch=4",
    f"generator.lr={RATE}",
    "preference.updates=0",
    "generator.warmup=0",
    "score.warmup=0",
    "deadlines.start_s=1200",
]
ZERO = [
    "runtime=ray",
    "placement.learner.workers=2",
    "placement.discriminator.within=learner",
    "engine.kind=deepspeed",
    "engine.zero_stage=2",
]


class Steps:
    preference_rate = 1.0

    def __init__(self, steps: range) -> None:
        self._steps = steps

    def steps(self) -> Iterable[int]:
        return self._steps

    def finish(self, step: int, metrics: Metrics) -> None:
        self.last = metrics


class Training:
    """A runtime that trains the steps it is told."""

    def __init__(self, *settings: str) -> None:
        self.config = load_config(None, [*SMALL, *settings])
        self.runtime = build_runtime(self.config)
        self.roles = (self.runtime.generator, self.runtime.score, self.runtime.discriminator)

    def train(self, steps: range) -> Metrics:
        """The last step's metrics."""
        run = Steps(steps)
        train(self.config, self.runtime, build_images(self.config.data, self.config.seed), run)
        return run.last

    def weights(self) -> dict[str, Tensor]:
        return self.runtime.generator.weights()  # type: ignore[no-any-return]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], share: float) -> None:
    """No weight off by more than a step's rate, and together by no more than a share of what training moved.

    AdamW moves a weight by about the rate however small its gradient is, so where that is almost zero rounding decides the direction.
    """
    moved, apart = 0.0, 0.0
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=0, atol=RATE)
        moved += (weights - start[name]).square().sum().item()
        apart += (weights - found[name]).square().sum().item()
    assert apart**0.5 < share * moved**0.5


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_of_zero_2_equal_plain_torch_and_continue_it(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        alone = Training("runtime=local")
        start = alone.weights()
        alone.train(range(1))
        saved = alone.weights()
        for role in alone.roles:
            role.save(tmp_path)
        metrics = alone.train(range(1, STEPS))
    finally:
        torch.set_num_threads(threads)
    together = Training(*ZERO)
    with closing(together.runtime):
        same_start = together.weights()
        assert all(torch.equal(start[name], weights) for name, weights in same_start.items())
        sharded_metrics = together.train(range(STEPS))
        for found in (metrics, sharded_metrics):
            assert all(found.pop(name) > 0 for name in ROOTS)
        assert sharded_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        assert_near(together.weights(), alone.weights(), start, 0.02)

        for role in together.roles:
            role.load(tmp_path)
        assert all(torch.equal(saved[name], weights) for name, weights in together.weights().items())
        together.train(range(1, STEPS))
        assert_near(together.weights(), alone.weights(), saved, 0.02)


def test_a_second_local_runtime_in_one_process() -> None:
    for _ in range(2):
        runtime = build_runtime(toy_config("local", engine__kind="deepspeed"), TOYS)
        runtime.close()
