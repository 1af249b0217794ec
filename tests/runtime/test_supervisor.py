"""A lost group costs the steps since the last checkpoint, nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from toy_roles import SHAPE, TOYS, toy_config

from flashdmd_ray.runtime import DeadlineExceeded, RoleFailed, Runtime, Supervisor, WorkerLost, build_runtime
from flashdmd_ray.runtime import supervisor as supervisor_module
from flashdmd_ray.runtime.cluster import Cluster
from flashdmd_ray.runtime.errors import Closed, NoRoom
from flashdmd_ray.serving.command import wait_while_alive
from flashdmd_ray.training.checkpoint_saver import CheckpointError

STEPS, EVERY, DIE_AT = 6, 2, 3


def train(
    runtime: Runtime, directory: Path, die_at: int | None, loaded: Callable[[int], None] = lambda step: None
) -> torch.Tensor:
    """Six updates with a checkpoint after every second; a resumed attempt starts after the last one."""
    done = newest(directory)
    trained = (runtime.generator, runtime.discriminator)
    for role in trained if done else ():
        role.load(directory / str(done))
    loaded(done)
    for step in range(done, STEPS):
        runtime.step = step
        gradient = torch.full((4, *SHAPE), float(step))
        runtime.discriminator.step_along(gradient)
        if step == die_at and not (directory / "died").exists():
            (directory / "died").touch()
            runtime.generator.dies()
        runtime.generator.distillation_step(gradient, gradient)
        if (step + 1) % EVERY == 0:
            (directory / str(step + 1)).mkdir()
            for role in trained:
                role.save(directory / str(step + 1))
    return torch.stack([role.weights()["weight"] for role in trained])


def newest(directory: Path) -> int:
    return max((int(path.name) for path in directory.glob("[0-9]*")), default=0)


@pytest.mark.usefixtures("ray_cluster")
def test_a_dead_learner_is_rebuilt_and_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whole ranks live on. test_lost_tensors.py has a loss before the first checkpoint."""
    config = toy_config()
    roles = {name: TOYS[name] for name in ("learner", "discriminator", "reward")}
    (tmp_path / "quiet").mkdir()
    (tmp_path / "struck").mkdir()
    local = build_runtime(toy_config("local"), roles)
    expected = train(local, tmp_path / "quiet", die_at=None)

    old: list[Any] = []
    workers: list[tuple[int, ...]] = []

    def attempt(runtime: Runtime, loaded: Callable[[int], None]) -> torch.Tensor:
        old[:] = old or [runtime.rewards["reward"], runtime.discriminator]
        workers.append(tuple(role.pids().item() for role in (runtime.rewards["reward"], runtime.discriminator)))
        return train(runtime, tmp_path / "struck", DIE_AT, loaded)

    supervisor = Supervisor(config.deadlines, lambda: newest(tmp_path / "struck"))
    result = supervisor.run(attempt, lambda previous: build_runtime(config, roles, previous=previous))
    assert result is not None
    assert torch.equal(result, expected)
    assert (
        f"attempt 1 of 3 since the last checkpoint failed: generator.dies at step {DIE_AT}: learner-0 is gone"
        in caplog.text
    )
    assert workers[0] == workers[1]
    for role in old:
        with pytest.raises(Closed):
            role.pids()
    assert "Its log ends: last words of generator" in caplog.text
    again = rf"recovered from: generator\.dies at step {DIE_AT}: .*; steps {DIE_AT} to {DIE_AT + 1} made again; "
    assert re.search(again + "detected in .* s, rebuilt in .* s, loaded in .* s", caplog.text)


class Recorder:
    """Stands for a runtime where only its end and its step are of interest."""

    def __init__(self) -> None:
        self.closed = self.ended = 0
        self.step: int | None = None

    def end_attempt(self, newest: int) -> None:
        self.ended += 1

    def close(self) -> None:
        self.closed += 1


class Script:
    """A job whose attempts end as written: each entry is the step and the error of one attempt."""

    def __init__(self, *faults: tuple[int, Exception]) -> None:
        self.faults = list(faults)
        self.built: list[Recorder] = []
        self.checkpoint = 0

    def build(self, previous: Recorder | None = None) -> Recorder:
        assert previous is (self.built[-1] if self.built else None)
        self.built.append(Recorder())
        return self.built[-1]

    def attempt(self, runtime: Recorder, loaded: Callable[[int], None]) -> str:
        loaded(self.checkpoint)
        if not self.faults:
            return "done"
        runtime.step, error = self.faults.pop(0)
        raise error

    def run(self, **limits: float) -> object:
        supervisor = Supervisor(
            toy_config(**{f"deadlines__{k}": v for k, v in limits.items()}).deadlines, lambda: self.checkpoint
        )
        return supervisor.run(self.attempt, self.build)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "LONGEST_PAUSE_S", 0.0)
    monkeypatch.setattr(supervisor_module, "LOOK_S", 0.01)


@pytest.mark.parametrize(
    ("error", "attempts"),
    [(WorkerLost, 4), (FloatingPointError, 4), (ValueError, 1), (KeyboardInterrupt, 1), (CheckpointError, 1)],
)
def test_which_errors_lead_to_another_attempt(error: type[Exception], attempts: int) -> None:
    script = Script(*[(step, error("struck")) for step in (5, 6, 7, 8, 9)])
    with pytest.raises(error, match="struck"):
        script.run(attempts=4)
    assert len(script.built) == attempts
    assert script.built[-1].closed == 1
    assert all(runtime.ended == 1 for runtime in script.built[:-1])


def test_faults_are_counted_anew_after_a_checkpoint() -> None:
    script = Script(*[(step, WorkerLost("struck")) for step in range(1, 40)])

    def attempt(runtime: Recorder, loaded: Callable[[int], None]) -> str:
        script.checkpoint += len(script.built) % 2 == 0
        return script.attempt(runtime, loaded)

    limits = toy_config(deadlines__attempts=3).deadlines
    assert Supervisor(limits, lambda: script.checkpoint).run(attempt, script.build) == "done"
    assert len(script.built) == 40


@pytest.mark.parametrize(
    ("error", "attempts"), [(WorkerLost, 3), (DeadlineExceeded, 3), (FloatingPointError, 2), (RoleFailed, 2)]
)
def test_a_fault_that_repeats_at_one_step_is_no_accident(error: type[Exception], attempts: int) -> None:
    script = Script(*[(5, error("struck"))] * 9)
    with pytest.raises(
        error, match=rf"struck \(the same fault {attempts} times in a row at the same step: no accident\)"
    ):
        script.run(attempts=9)
    assert len(script.built) == attempts
    other = Script((5, error("struck")), (6, error("struck")), (5, error("struck")), (6, error("struck")))
    assert other.run(attempts=9) == "done"


def test_a_job_without_room_is_refused_at_the_start_and_waits_after_a_fault() -> None:
    script = Script((3, WorkerLost("a machine left")))
    full = iter([False, True, True, False])

    def build(previous: Recorder | None) -> Recorder:
        if next(full):
            raise NoRoom("no room")
        return script.build(previous)

    limits = toy_config(deadlines__attempts=3).deadlines
    assert Supervisor(limits).run(script.attempt, build) == "done"
    assert len(script.built) == 2

    def never(previous: Recorder | None) -> Recorder:
        raise NoRoom("no room")

    with pytest.raises(NoRoom):
        Supervisor(limits).run(script.attempt, never)
    script = Script((3, WorkerLost("a machine left")))
    first = iter([script.build])
    with pytest.raises(WorkerLost, match=r"no room within 0\.05 s: no room"):
        Supervisor(toy_config(deadlines__start_s=0.05).deadlines).run(
            script.attempt, lambda previous: next(first, never)(previous)
        )


def test_a_job_that_is_asked_to_stop_is_not_rebuilt() -> None:
    script = Script((3, WorkerLost("struck")))
    assert Supervisor(toy_config().deadlines, is_stopping=lambda: True).run(script.attempt, script.build) is None
    assert len(script.built) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_a_service_whose_private_ray_lost_a_process_ends(tmp_path: Path) -> None:
    with ExitStack() as ends:
        processes = []
        for name in ("raylet", "gcs_server"):
            shutil.copy("/bin/sleep", tmp_path / name)
            processes.append(ends.enter_context(subprocess.Popen([tmp_path / name, "60"])))
            ends.callback(processes[-1].kill)
        cluster = Cluster(joined=True, private=True, processes=tuple(psutil.Process(p.pid) for p in processes))
        threading.Timer(0.2, processes[1].kill).start()
        with pytest.raises(WorkerLost, match="a process of the private Ray is gone"):
            wait_while_alive(threading.Event(), cluster)
