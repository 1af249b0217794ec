"""The same training on a GPU: run where there is one (`pytest -m gpu`)."""

from __future__ import annotations

import pytest
import torch

from flashdmd_ray.config import load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.runtime.build import build_runtime

GROUPS = ("learner", "discriminator", "rollout", "reward")
SMALL = ["runtime=local", "steps=2", "batch=4", "preference.updates=1", "preference.batch=2", "evaluation.ema=0.9"]


class Recorder:
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
    from flashdmd_ray.roles.networks import device_of

    config = load_config(None, ["runtime=local", "placement.rollout.gpus=0.5"])
    with pytest.raises(ValueError, match=r"placement\.rollout\.gpus: 0\.5 asked for, but torch sees no GPU"):
        device_of(config, "rollout")
    assert device_of(config, "learner") == torch.device("cpu")
