"""A driver of its own on a cluster: spreads a job over machines, uses one that is added, and lives on when one is lost.

Argument: Ray's temporary folder. Each line it prints begins with a word that test_machines.py waits for.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy_roles import TOYS, toy_config

from flashdmd_ray.batch import PreferencePairs, Prompts, choose
from flashdmd_ray.config import Config
from flashdmd_ray.runtime import Runtime, Supervisor, build_runtime

GROUPS = {name: TOYS[name] for name in ("learner", "rollout", "reward")}
CPUS = {"placement__learner__cpus": 3, "placement__rollout__cpus": 4, "placement__reward__cpus": 1}
"""On machines of 4, the rollouts are alone on theirs."""
ROUNDS, GROUP_COUNT = 5, 1500
"""Rounds of candidates that are held at once, 20 KiB for each prompt group: together more than the object store of a machine has."""


def build(config: Config, previous: Runtime | None = None) -> Runtime:
    return build_runtime(config, GROUPS, say=lambda line: print(line, flush=True), previous=previous)


def train(runtime: Any) -> Tensor:
    """Preference updates from candidates that were all made before the first of them is scored; returns the weight."""
    prompts, ones = Prompts(("a",) * GROUP_COUNT, torch.arange(GROUP_COUNT)), torch.ones(GROUP_COUNT)
    weights = runtime.publish(0).result()
    rounds = [runtime.rollouts.candidates(prompts, 1, seed, weights) for seed in range(ROUNDS)]
    print(
        "spilled", sum(path.stat().st_size for path in Path(sys.argv[1]).glob("session_*/ray_spilled*/*")), flush=True
    )
    for found in rounds:
        rewards = runtime.rewards["reward"].score(found)["toy"]
        winners, losers = (choose(found.values, best) for best in (rewards.argmax(1), rewards.argmin(1)))
        pairs = PreferencePairs(prompts, found.noisy, winners, losers, ones, ones, 999, 749, 0)
        runtime.generator.preference_step(pairs)
    weight: Tensor = runtime.generator.weights()["weight"]
    return weight


def use_added_machine(runtime: Any) -> None:
    """Grow the pool of rewards as soon as there is room, and call both of its workers."""
    while runtime.pools["reward"].state().size == 1:
        try:
            runtime.pools["reward"].resize(2)
        except ValueError as error:
            print("full", error, flush=True)
            time.sleep(0.5)
    calls: list[Callable[[], Any]] = [lambda: runtime.rewards["reward"].pids(0.2)] * 2
    while len(pids := {int(pid) for pid in runtime.parallel(*calls)}) == 1:
        time.sleep(0.1)
    print("rewards", *pids, flush=True)


def attempt(runtime: Any, loaded: Callable[[int], None]) -> None:
    loaded(0)
    print("workers", *(int(role.pids()) for role in (runtime.generator, runtime.rollouts)), flush=True)
    if runtime.pools["reward"].state().size == 1:
        print("equal", torch.equal(train(runtime), train(build(toy_config("local")))), flush=True)
        use_added_machine(runtime)
    while True:
        runtime.step = 0
        runtime.generator.sleeps(0.1)


if __name__ == "__main__":
    config = toy_config(deadlines__attempts=2, **CPUS)
    Supervisor(config.deadlines).run(attempt, lambda previous: build(config, previous))
