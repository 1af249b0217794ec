"""One algorithm, two runtimes: equal results bit for bit with one rank each, and but for summation order with several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_roles import TOYS, toy_config

from flashdmd_ray.batch import PreferencePairs, Prompts, StepRng, choose
from flashdmd_ray.config import Config
from flashdmd_ray.runtime import Runtime, build_runtime
from tests.levels import levels

BATCH = 5


def toy_training(runtime: Runtime, steps: int = 3) -> list[Any]:
    """The calls of the real loop, in its order; everything the driver saw."""
    seen: list[Any] = []
    for step in range(steps):
        runtime.step = step
        draw = StepRng(7, step)
        prompts = Prompts(tuple(f"a red {i}" for i in range(BATCH)), torch.arange(BATCH))
        timesteps = draw.timesteps("t", BATCH, 20, 980)
        weights = runtime.publish(step).result()
        candidates = runtime.background(
            lambda p=prompts, d=draw, w=weights: runtime.rollouts.candidates(p, 1, d.seed("candidates"), w)
        )
        fakes = runtime.generator.generate(prompts, levels(prompts, 2, None), seed=draw.seed("predict"))
        (matching, gap), (realism, mean) = runtime.parallel(
            lambda f=fakes, t=timesteps, d=draw: runtime.score.dm_gradient(f, t, d.seed("score")),
            lambda f=fakes: runtime.discriminator.gan_gradient(f),
        )
        metrics = runtime.generator.distillation_step(matching, 0.5 * realism)
        assert runtime.score.ema_update_from(runtime.generator, 0.9) is None
        updates = runtime.parallel(
            lambda f=fakes, t=timesteps: runtime.score.denoising_step(f, t),
            lambda f=fakes, t=timesteps: runtime.discriminator.step(f, t),
        )
        found = candidates.result()
        rewards = runtime.rewards["reward"].score(found)["toy"]
        winners, losers = (choose(found.values, best) for best in (rewards.argmax(1), rewards.argmin(1)))
        pairs = PreferencePairs(
            prompts, found.noisy, winners, losers, torch.ones(BATCH), torch.ones(BATCH), 999, 749, found.version
        )
        preferred = runtime.generator.preference_step(pairs)
        seen += [runtime.fetch(fakes.values), runtime.fetch(found.values), matching, realism, rewards, gap, mean]
        seen += [metrics, *updates, preferred]
    return [*seen, runtime.generator.weights()["weight"], runtime.score.weights()["weight"]]


def run(config: Config) -> list[Any]:
    runtime = build_runtime(config, TOYS)
    try:
        return toy_training(runtime)
    finally:
        runtime.close()


@pytest.mark.usefixtures("ray_cluster")
def test_one_rank_is_bit_identical() -> None:
    local, ray = run(toy_config("local")), run(toy_config("ray"))
    assert len(local) == len(ray)
    for index, (here, there) in enumerate(zip(local, ray, strict=True)):
        assert torch.equal(here, there) if isinstance(here, torch.Tensor) else here == there, index


@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_agree_and_keep_the_order_of_the_batch() -> None:
    local = run(toy_config("local"))
    ray = run(
        toy_config(
            "ray", placement__learner__workers=2, placement__discriminator__workers=2, placement__rollout__workers=2
        )
    )
    assert torch.equal(local[0], ray[0]), (
        "the first prediction depends on nothing but the weights: shards must join exactly"
    )
    for here, there in zip(local, ray, strict=True):
        torch.testing.assert_close(
            here, there, rtol=3e-5, atol=1e-5
        )  # sums of float32 in another order, for metrics too
