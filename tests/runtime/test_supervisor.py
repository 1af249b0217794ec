"""A lost learner costs the steps since the last checkpoint, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_roles import TOYS, toy_config

from flashdmd_ray.runtime import Runtime, WorkerLost, build_runtime, run_supervised

STEPS, EVERY = 6, 2


def train(runtime: Runtime, directory: Path, die_at: int | None) -> torch.Tensor:
    """Six updates with a checkpoint after every second; a resumed attempt starts after the last one."""
    done = max((int(path.name) for path in directory.glob("[0-9]*")), default=0)
    if done:
        runtime.generator.load(directory / str(done))
    for step in range(done, STEPS):
        runtime.step = step
        if step == die_at and not (directory / "died").exists():
            (directory / "died").touch()
            runtime.generator.dies()
        gradient = torch.full((4, 2, 4, 4), float(step))
        runtime.generator.distillation_step(gradient, gradient)
        if (step + 1) % EVERY == 0:
            (directory / str(step + 1)).mkdir()
            runtime.generator.save(directory / str(step + 1))
    return runtime.generator.weights()["weight"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_dead_learner_is_rebuilt_and_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = toy_config(preference__updates=0)
    roles = {"learner": TOYS["learner"]}
    (tmp_path / "quiet").mkdir()
    (tmp_path / "struck").mkdir()
    local = build_runtime(toy_config("local", preference__updates=0), roles)
    expected = train(local, tmp_path / "quiet", die_at=None)
    result = run_supervised(
        lambda runtime: train(runtime, tmp_path / "struck", die_at=3),
        lambda: build_runtime(config, roles),
        max_attempts=2,
    )
    assert torch.equal(result, expected)
    assert "attempt 1 of 2 failed: generator.dies at step 3: learner-0 is gone" in caplog.text


class Recorder:
    """Stands for a runtime where only its end is of interest."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("error", "attempts"), [(WorkerLost, 3), (ValueError, 1), (FloatingPointError, 1), (KeyboardInterrupt, 1)]
)
def test_which_errors_lead_to_another_attempt(error: type[BaseException], attempts: int) -> None:
    built: list[Recorder] = []

    def build() -> Recorder:
        built.append(Recorder())
        return built[-1]

    def attempt(runtime: Recorder) -> None:
        raise error("struck")

    with pytest.raises(error, match="struck"):
        run_supervised(attempt, build, max_attempts=3)
    assert [runtime.closed for runtime in built] == [1] * attempts
