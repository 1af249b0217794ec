"""The same training on a GPU: run where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture
def full_size(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The benchmark of a whole training step, which reads networks of any size."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import full_size

    return full_size.measure_full_size


SMALL_STEP = [
    "batch=2",
    "engine.accumulation=1",
    "preference.updates=1",
    "preference.batch=2",
    "preference.candidates=2",
]


def assert_complete(found: dict[str, Any]) -> None:
    assert set(found["roles"]) == {"generator", "score", "discriminator", "rollouts", "pickscore"}
    for name in (
        "generator.generate",
        "generator.distillation_step",
        "generator.preference_step",
        "score.dm_gradient",
        "discriminator.step",
    ):
        verb = found["verbs"][name]
        assert verb["calls"] > 0, name
        assert verb["seconds"] > 0, name
    assert found["verbs"]["score.ema_update_from"]["tflop"] == 0
    assert found["verbs"]["generator.generate"]["tflop"] > found["verbs"]["score.dm_gradient"]["tflop"] > 0
    assert found["all"]["tflop"] == pytest.approx(sum(role["tflop"] for role in found["roles"].values()))
    assert found["all"]["seconds"] <= found["seconds_per_step"]
    assert 0 < found["unet_part"]["share_of_peak"] < 1


def test_the_cost_of_a_step_is_measured_by_role(full_size: Callable[..., dict[str, Any]]) -> None:
    """On whatever device there is; the sizes of published models are for a GPU."""
    threads = torch.get_num_threads()
    try:
        found = full_size("tiny", random=True, steps=1, overrides=SMALL_STEP)
    finally:
        torch.set_num_threads(threads)
    assert_complete(found)
    on_gpu = torch.cuda.is_available()
    assert all((role["peak_gib"] > 0) == on_gpu for role in found["roles"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_full_size_without_a_gpu_is_refused(full_size: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="--preset sdxl needs a GPU and torch sees none; --preset tiny"):
        full_size("sdxl", random=True, steps=1)
