"""Every verb of every role with its networks on a GPU, where none is needed: what would mix devices is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

from flashdmd_ray.batch import Prompts, PublishedWeights
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.data.executor import in_threads
from flashdmd_ray.data.precompute import precompute
from flashdmd_ray.driver import train
from flashdmd_ray.monitor import ranking
from flashdmd_ray.roles import networks, reward
from flashdmd_ray.roles.rollout import Rollout
from flashdmd_ray.runtime.border import RoleHere
from flashdmd_ray.runtime.build import build_runtime
from flashdmd_ray.runtime.call_times import CallTimes
from tests import tiny
from tests.data.scenes_on_disk import samples, write_tars
from tests.simulated_gpu import CPU, GPU, SimulatedGpu, device_of

GROUPS = ("learner", "discriminator", "rollout", "reward")
SMALL = [
    *("runtime=local", "steps=1", "batch=2", "preference.updates=1", "preference.batch=2", "preference.candidates=2"),
    *("preference.threshold=0", "evaluation.ema=0.9", *(f"placement.{group}.gpus=1" for group in GROUPS)),
    "data.scenes=64",
]
BFLOAT = ["engine.precision=bfloat16", "model.dtype=bfloat16"]
PIXEL_REWARD = "rewards=[{kind: pickscore}]"
LORA = [*BFLOAT, PIXEL_REWARD, "lora.networks=[generator, score]", "engine.offload_optimizer=true"]
TINY = {"sdxl": tiny.save_sdxl, "sd15": tiny.save_sd15, "sd3": tiny.save_sd3}
CASES: dict[str, tuple[str | None, str | None, list[str]]] = {
    "demo": (None, None, []),  # with its latent reward
    "sdxl in bfloat16 with everything": (
        None,
        "sdxl",
        [
            *(*BFLOAT, PIXEL_REWARD, "engine.accumulation=2", "engine.gradient_checkpointing=true", "ttur=2"),
            *("adversarial.real_through_vae=true", "adversarial.prompt_projection=true", "adversarial.balance=0.5"),
            "preference.candidate_image=remaining_steps",
        ],
    ),
    "sdxl lora": (None, "sdxl", LORA),
    "sd15": (None, "sd15", [PIXEL_REWARD]),
    "sd15 lora": (None, "sd15", LORA),
    "sd3": (None, "sd3", [PIXEL_REWARD]),
    "sd3 lora": (None, "sd3", LORA),
    "dmd2": ("demo_dmd2", "sdxl", [PIXEL_REWARD, "ttur=2"]),
    "stored": (None, "sdxl", [PIXEL_REWARD, "adversarial.real_through_vae=true", "data.max_bad_fraction=0.2"]),
}
"""Preset, family of a tiny teacher (None: the demo's), settings."""


class OneStep:
    """A run of one step that keeps its metrics."""

    preference_rate = 1.0
    metrics: dict[str, float]

    def steps(self) -> range:
        return range(1)

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        self.metrics = metrics


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles that ask for a GPU get the simulated one."""

    def device(config: Config, group: str) -> torch.device:
        return GPU if config.placement.of(group).gpus else CPU

    # Checkpointing computes again where no Python mode is on, so that nothing tells the devices.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    monkeypatch.setitem(checks, "default", lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype})
    monkeypatch.setattr(networks, "group_device", device)
    monkeypatch.setattr(reward, "group_device", device)
    monkeypatch.setattr(ranking, "GROUPS", 2)


def configured(case: str, folder: Path) -> Config:
    preset, family, changes = CASES[case]
    if family is not None:
        changes = [*changes, f"model.family={family}", f"model.teacher={TINY[family](folder / 'teacher')}"]
    if case != "stored":
        return load_config(preset, [*SMALL, *changes])
    write_tars(folder / "images", samples(8), each=4)
    changes += [f"data.source={folder / 'images'}", f"data.cache={folder / 'cache'}"]
    config = load_config(preset, [*SMALL, *changes])
    for what in ("embeddings", "latents"):
        stored = precompute(what, config.data, config.model, folder, in_threads, networks.load_parts)
        changes.append(f"data.{what}={stored}")
    return load_config(preset, [*SMALL, *changes])


@pytest.mark.parametrize("case", CASES)
def test_no_role_mixes_devices(case: str, gpus: None, tmp_path: Path) -> None:
    config = configured(case, tmp_path)
    networks._shared_family.cache_clear()
    run = OneStep()
    with SimulatedGpu():
        runtime = build_runtime(config)
        train(config, runtime, build_images(config.data, config.seed), run)
        prompts = Prompts(("a red 4 on a gray background", "a blue 3 on a white background"), torch.arange(2))
        pictures = runtime.generator.generate_images(prompts, config.sampling.timesteps, 0)
        teachers = runtime.score.generate_teacher_images(prompts, 2, 3.0, 0)
        assert device_of(pictures) == device_of(teachers) == CPU
        published = PublishedWeights(1, runtime.generator.weights(), "published")
        elsewhere = RoleHere("rollout", "rollouts", Rollout.from_config(config), CallTimes())
        candidates = elsewhere.candidates(prompts, 0, 0, published)
        assert {device_of(tensor) for tensor in (*published.tensors.values(), candidates.images)} == {CPU}
        roles = (runtime.generator, runtime.score, runtime.discriminator)
        assert all(isinstance(role, RoleHere) for role in (*roles, runtime.rollouts, *runtime.rewards.values()))
        for role in roles:
            role.save(tmp_path)
        for role in roles:
            role.load(tmp_path)
    networks._shared_family.cache_clear()
    assert {"matching/gradient_norm", "score/loss", "discriminator/accuracy_real"} <= run.metrics.keys()
    assert run.metrics["preference/updates"] == 1


def test_the_simulated_gpu_refuses_what_cuda_refuses() -> None:
    here = torch.ones(2)
    with SimulatedGpu():
        there = torch.ones(2, device="cuda")
        assert device_of((2 * there).relu()) == GPU
        assert device_of(there.cpu() + here) == CPU
        linear = torch.nn.Linear(2, 2).to("cuda")
        linear(there).sum().backward()
        assert device_of(linear.weight.grad) == GPU
        for call in (lambda: here + there, lambda: linear(here), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="device"):
                call()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
