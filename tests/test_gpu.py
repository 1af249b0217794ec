"""The same training on a GPU: run where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.runtime.build import build_runtime
from tests.engine.common import ALL_KINDS, Network, PlainTorch, batch, engine, mean_loss

GROUPS = ("learner", "discriminator", "rollout", "reward")
SMALL = ["runtime=local", "steps=2", "batch=4", "preference.updates=1", "preference.batch=2", "evaluation.ema=0.9"]


class Recorder:
    preference_rate = 1.0

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.metrics: list[dict[str, float]] = []

    def steps(self) -> range:
        return range(self._steps)

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


def run(*overrides: str) -> list[dict[str, float]]:
    config = load_config(None, [*SMALL, *overrides])
    recorder = Recorder(config.steps)
    train(config, build_runtime(config), build_images(config.data, config.seed), recorder)
    return recorder.metrics


@pytest.mark.gpu
def test_two_steps_on_a_gpu_give_the_metrics_of_the_cpu() -> None:
    on_gpu = run(*(f"placement.{group}.gpus=1" for group in GROUPS))
    for cpu, gpu in zip(run(), on_gpu, strict=True):
        assert cpu.keys() == gpu.keys()
        for name, value in cpu.items():
            assert gpu[name] == pytest.approx(value, rel=2e-2, abs=2e-3), name


@pytest.mark.gpu
def test_roles_on_different_devices_of_one_process_work_together() -> None:
    metrics = run("placement.learner.gpus=1")
    assert all(torch.isfinite(torch.tensor(list(step.values()))).all() for step in metrics)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named_with_its_key() -> None:
    from flashdmd_ray.roles.networks import group_device

    config = load_config(None, ["runtime=local", "placement.rollout.gpus=0.5"])
    with pytest.raises(ValueError, match=r"placement\.rollout\.gpus: 0\.5 asked for, but torch sees no GPU"):
        group_device(config, "rollout")
    assert group_device(config, "learner") == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_engines_train_on_a_gpu_as_on_the_cpu(kind: str) -> None:
    trained, plain = engine(kind, module=Network(0).cuda()), PlainTorch()
    for step in range(3):
        trained.backward(mean_loss(trained, batch(step).cuda()))
        trained.update()
        plain.step(step)
    for name, weights in trained.weights().items():
        assert (weights - plain.module.state_dict()[name]).square().mean().sqrt() < 1e-4, name


@pytest.mark.gpu
def test_offloaded_masters_leave_the_gpu() -> None:
    held = []
    for kind in ("torch", "torch-offload"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        trained = engine(kind, module=Network(0).cuda())
        trained.backward(mean_loss(trained, batch(0).cuda()))
        trained.update()
        held.append(torch.cuda.memory_allocated() - before)
        del trained
    assert held[1] < 0.8 * held[0]


def test_the_gpu_hour_measures_beside_the_plan_on_whatever_device_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its joint step, on networks of the demo's size: every call of a role with its seconds and the plan's."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import gpu_hour

    place = gpu_hour.Place(torch.device("cpu"), True, tmp_path)
    threads = torch.get_num_threads()
    try:
        (row,) = gpu_hour.sdxl(place)
    finally:
        torch.set_num_threads(threads)
    assert set(row["calls"]) >= {
        "generator.generate",
        "generator.distillation_step",
        "generator.preference_step",
        "score.dm_gradient",
        "discriminator.step",
        "rollouts.candidates",
    }
    assert all(call["seconds"] > 0 for call in row["calls"].values())
    assert row["calls"]["generator.generate"]["planned_seconds"] > 0
    assert 0 < sum(call["seconds"] for call in row["calls"].values()) <= row["seconds"]
    assert 0 < row["share_of_peak"] < 1
    (line,) = gpu_hour.table([row]).splitlines()[2:]
    assert line.count("|") == len(gpu_hour.COLUMNS) + 1
