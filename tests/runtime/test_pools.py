"""Pools: lost, hanging and failing workers cost a replay, not the run."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import RoleFailed, Runtime, WorkerLost, build_runtime


def rewards(**settings) -> Runtime:
    return build_runtime(toy_config(**settings), {"reward": TOYS["reward"]})


@pytest.fixture(scope="module")
def two(ray_cluster: None) -> Iterator[Runtime]:
    """A reward pool of two workers, shared by the tests below: it heals."""
    runtime = rewards(placement__reward__workers=2, deadlines__reward_s=4.0, deadlines__retries=1)
    yield runtime
    runtime.close()


@pytest.mark.parametrize("how", ["die", "hang", "fail", "raise"])
def test_a_call_is_replayed(two: Runtime, how: str, tmp_path: Path) -> None:
    assert two.rewards["reward"].fails_first(tmp_path / "marker", how) > 0


def test_retries_are_bounded(two: Runtime) -> None:
    with pytest.raises(RoleFailed, match=r"rewards/reward\.raises .*failed: RuntimeError"):
        two.rewards["reward"].raises(RuntimeError)
    two.step = 3
    with pytest.raises(WorkerLost, match=r"rewards/reward\.dies at step 3: reward-\d+ is gone"):
        two.rewards["reward"].dies()
    assert two.rewards["reward"].sleeps(0.0) == 0.0


def test_a_reward_s_own_error_is_replayed_and_arrives_as_it_was_raised(
    two: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="raised in rank") as caught:
        two.rewards["reward"].raises(ValueError)
    assert re.fullmatch(r"raised in rank \d+", str(caught.value))
    assert re.search(r"reward-(\d+): ValueError: raised in rank \1; the call is replayed \(0 left\)", caplog.text)


def test_an_idle_worker_that_died_is_replaced(two: Runtime) -> None:
    (pid,) = two.rewards["reward"].pids().tolist()
    os.kill(pid, signal.SIGKILL)
    answers = two.parallel(*[lambda: two.rewards["reward"].pids().item()] * 4)
    assert pid not in answers


def test_calls_from_several_threads_use_all_workers_and_the_size_may_change(two: Runtime) -> None:
    def together(calls: int) -> set[int]:
        def one() -> int:
            two.rewards["reward"].sleeps(0.3)
            return two.rewards["reward"].pids().item()

        return set(two.parallel(*[one] * calls))

    two.pools["reward"].setup()  # waits until all members are up
    assert len(together(6)) == 2
    running = two.background(lambda: together(12))
    time.sleep(0.2)
    two.pools["reward"].resize(3)
    assert len(running.result(timeout=30)) >= 2
    two.pools["reward"].setup()
    assert len(together(9)) == 3
    running = two.background(lambda: together(6))
    time.sleep(0.2)
    two.pools["reward"].resize(1)
    running.result(timeout=30)
    assert len(together(3)) == 1
    two.pools["reward"].resize(2)
    two.pools["reward"].setup()


def test_a_pool_cannot_be_resized_beyond_the_cluster(two: Runtime) -> None:
    with pytest.raises(ValueError, match=r"placement\.reward: .*finds no room"):
        two.pools["reward"].resize(100_000)
    with pytest.raises(ValueError, match="at least 1 worker"):
        two.pools["reward"].resize(0)
    assert two.pools["reward"].size == 2


def test_a_pool_grows_with_its_queue_and_shrinks_again(ray_cluster: None) -> None:
    placed = {"workers": 1, "max_workers": 2, "shrink_after_s": 2.0}
    with closing(rewards(placement__reward=placed)) as runtime:
        pool, stop = runtime.pools["reward"], threading.Event()

        def call() -> int:
            calls = 0
            while not stop.is_set():
                runtime.rewards["reward"].sleeps(0.2)
                calls += 1
            return calls

        callers = [runtime.background(call) for _ in range(4)]
        wait_until(lambda: pool.state().size == 2, 10.0)
        wait_until(lambda: pool.state().ready == 2, 120.0)
        figures = runtime.pool_metrics()
        assert figures["pool/reward/busy"] > 0.5
        assert figures["pool/reward/queue"] >= 2
        stop.set()
        assert all(caller.result(60) > 0 for caller in callers)
        wait_until(lambda: pool.state().size == pool.state().ready == 1, 30.0)
        assert (pool.state().busy, pool.state().waiting, pool.state().low, pool.state().high) == (0, 0, 1, 2)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.05)
