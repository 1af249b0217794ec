"""Tensors in the object store that are gone before they are read: the steps since the checkpoint are made again, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from toy_roles import SHAPE, TOYS, toy_config

from flashdmd_ray.batch import PreferencePairs, Prompts, StoredRows, choose
from flashdmd_ray.runtime import Runtime, Supervisor, build_runtime, supervisor

GROUPS = {name: TOYS[name] for name in ("learner", "rollout", "reward")}
GROUP_COUNT = 16
"""Prompt groups, so many that their candidates are too large for Ray to send them with the answer."""


def wait_until_gone(reference: ray.ObjectRef) -> None:
    """Ray keeps what a process owned until it has noticed its end."""
    with suppress(RayError):
        while True:
            ray.get(reference)
            time.sleep(0.05)


@pytest.fixture
def lost(ray_cluster: None) -> Any:
    """Values of candidates, gone with a process that had them."""

    class Holder:
        def put(self, value: Any) -> list[ray.ObjectRef]:
            return [ray.put(value)]

    remote: Any = ray.remote(num_cpus=0)(Holder)
    holder = remote.remote()
    (reference,) = ray.get(holder.put.remote([np.zeros((GROUP_COUNT, 3, *SHAPE), np.float32)]))
    ray.kill(holder)
    wait_until_gone(reference)
    return StoredRows(((reference, 0, 0, GROUP_COUNT),))


def train(runtime: Runtime, lost: Any = None, reader: str = "", learner: int = 0) -> Tensor:
    """Two preference updates. reader: whose call of the second one finds its tensors gone; learner: its process id."""
    prompts, ones = Prompts(("a",) * GROUP_COUNT, torch.arange(GROUP_COUNT)), torch.ones(GROUP_COUNT)
    for step in range(2):
        runtime.step = step
        weights = runtime.publish(step).result()
        if step and reader == "rollouts":
            os.kill(learner, signal.SIGKILL)
            wait_until_gone(weights.tensors)
        found = runtime.rollouts.candidates(prompts, 1, step, weights)
        if step and reader == "rewards":
            found = replace(found, values=lost)
        rewards = runtime.rewards["reward"].score(found)["toy"]
        if step and reader == "generator":
            found = replace(found, values=lost)
        winners, losers = (choose(found.values, best) for best in (rewards.argmax(1), rewards.argmin(1)))
        if step and reader == "driver":
            runtime.fetch(lost)
        pairs = PreferencePairs(prompts, found.noisy, winners, losers, ones, ones, 999, 749, step)
        runtime.generator.preference_step(pairs)
    weight: Tensor = runtime.generator.weights()["weight"]
    return weight


def test_whoever_misses_them_nothing_but_what_is_lost_starts_anew(
    lost: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.0)
    readers = ["rewards", "generator", "driver", "rollouts", ""]
    workers: list[list[int]] = []

    def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> Tensor:
        loaded(0)
        roles: tuple[Any, ...] = (runtime.generator, runtime.rollouts, runtime.rewards["reward"])
        workers.append([int(role.pids()) for role in roles])
        return train(runtime, lost, readers[len(workers) - 1], workers[-1][0])

    config = toy_config(deadlines__attempts=9)
    result = Supervisor(config.deadlines).run(attempt, lambda last: build_runtime(config, GROUPS, previous=last))
    assert result is not None
    assert torch.equal(result, train(build_runtime(toy_config("local"), GROUPS)))
    assert workers[0] == workers[1] == workers[2] == workers[3]
    assert [new == old for new, old in zip(workers[4], workers[3], strict=True)] == [False, True, True]
    for call in ("rewards/reward.score", "generator.preference_step", "driver.fetch", "rollouts.candidates"):
        assert (
            f"failed: {call} at step 1: its tensors are gone with the machine or process that had them" in caplog.text
        )
    assert "recovered from: rollouts.candidates at step 1" in caplog.text
