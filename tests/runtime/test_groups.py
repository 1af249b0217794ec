"""Stateful groups: what happens when a rank raises, hangs or dies."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import pytest
import torch
from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import DeadlineExceeded, Runtime, WorkerLost, build_runtime


def learner(workers: int = 1, **settings: Any) -> Runtime:
    settings |= {"preference__updates": 0, "placement__learner__workers": workers}
    return build_runtime(toy_config(**settings), {"learner": TOYS["learner"]})


def test_ranks_share_processes_and_a_dead_one_is_named_at_once(ray_cluster: None) -> None:
    with closing(learner(workers=2)) as runtime:
        pids = runtime.generator.pids()
        assert torch.equal(pids, runtime.score.pids()), "roles of one group live in the same processes"
        assert len(set(pids.tolist())) == 2
        threads, omp, malloc = runtime.generator.facts()[:3]
        assert threads == omp == "1"
        assert int(malloc) > 2**20

        runtime.step = 12
        started = time.monotonic()
        with pytest.raises(WorkerLost, match=r"generator\.dies at step 12: learner-1 is gone"):
            runtime.generator.dies(only_rank=1)
        assert time.monotonic() - started < 10.0, "the other rank sleeps for 30 s: nobody may wait for it"
        with pytest.raises(WorkerLost):
            runtime.score.weights()  # a broken group answers nothing


def test_an_error_of_one_rank_arrives_as_it_was_raised(ray_cluster: None) -> None:
    with closing(learner(workers=2)) as runtime:
        with pytest.raises(FloatingPointError) as caught:
            runtime.generator.raises(FloatingPointError, only_rank=1)
        assert str(caught.value) == "raised in rank 1"
        assert "toy_roles.py" in caught.value.__notes__[0], "the remote traceback is kept as a note"


def test_a_hanging_call_runs_into_the_deadline(ray_cluster: None) -> None:
    with (
        closing(learner(deadlines__call_s=1.0)) as runtime,
        pytest.raises(
            DeadlineExceeded, match=r"score\.sleeps before the first step: learner-0 did not answer within 1 s"
        ),
    ):
        runtime.score.sleeps(30.0)


def test_a_role_that_cannot_be_built_says_why(ray_cluster: None) -> None:
    roles = {"learner": {"generator": "toy_roles:NoSuchRole"}}
    with pytest.raises(AttributeError, match="NoSuchRole"):
        build_runtime(toy_config(preference__updates=0), roles)


def test_a_job_without_room_is_refused_before_anything_starts(ray_cluster: None) -> None:
    with pytest.raises(ValueError, match=r"no room within 1 s .*needs learner 1 x \(1 GPU, .*free are 0 of 0 GPUs and"):
        learner(placement__learner__gpus=1, deadlines__start_s=1)
