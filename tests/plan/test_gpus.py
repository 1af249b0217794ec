"""GPUs that are there are used, where the configuration leaves it open."""

from __future__ import annotations

import re

import pytest

from flashdmd_ray.config import Config, load_config
from flashdmd_ray.plan.gpus import placed_on, use_gpus
from flashdmd_ray.plan.micro_batches import fit_micro_batches
from flashdmd_ray.runtime.build import worker_groups
from flashdmd_ray.serving.settings import ReplicaSettings

H100 = 79.6


def workers(config: Config) -> dict[str, tuple[int, float]]:
    return {group.name: (group.workers, group.gpus) for group in worker_groups(config)}


@pytest.mark.parametrize(
    ("preset", "changes", "gpus", "expected", "said"),
    [
        (
            "demo",
            [],
            8,
            {"learner": (8, 1)},
            "8 GPUs found, used so: a learner on each of 8, with all other roles within",
        ),
        ("demo", [], 1, {"learner": (1, 1)}, "1 GPU found, used so: a learner on each of 1"),
        (
            "demo",
            [],
            3,
            {"learner": (2, 1)},
            "3 GPUs found, used so: a learner on each of 2, .*3 ranks could not share",
        ),
        ("demo", ["placement.gpus=4"], 8, {"learner": (4, 1)}, "8 GPUs found, used so: a learner on each of 4"),
        ("demo", ["runtime=local"], 8, {"learner": (1, 1)}, "8 GPUs found, used so: 1 by the one process"),
        ("sdxl_8x80gb", [], 8, {"learner": (8, 1)}, "8 GPUs found, used so: learner 8"),
    ],
)
def test_used(preset: str, changes: list[str], gpus: int, expected: dict, said: str) -> None:
    config, line = placed_on(load_config(preset, changes), [H100] * gpus, "found")
    assert workers(config) == expected
    assert re.match(said, line), line
    assert config.placement.learner.gpu_memory_gib == (79 if preset == "sdxl_8x80gb" else 79.1)
    assert placed_on(config, [H100] * gpus, "found")[0] == config, "placed once, it stays"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["placement.gpus=0"], "2 GPUs found, none used: placement.gpus is 0"),
        (["placement.rollout.workers=2"], "2 GPUs found, none used: placement asks for none"),
    ],
)
def test_not_used(changes: list[str], reason: str) -> None:
    config = load_config("demo", changes)
    assert placed_on(config, [H100, H100], "found") == (config, reason)


def test_without_gpus_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("demo")
    assert placed_on(config, [], "found") == (config, "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert use_gpus(config) == (config, "")


def test_micro_batches_are_the_fewest_that_fit() -> None:
    """SDXL with adapters, batch 4, on 23.5 GiB: a denoiser's sample takes half a GiB, one of decoder and Segment Anything six."""
    chosen = fit_micro_batches(load_config("sdxl_lora_24gb", ["engine.accumulation=auto"]))
    assert (chosen.engine.accumulation, chosen.adversarial.accumulation) == (2, 4)
    assert fit_micro_batches(load_config("demo")) == load_config("demo"), "nothing is chosen on CPUs"


@pytest.mark.parametrize(
    ("settings", "gpus", "share"),
    [({}, 0, 0.0), ({}, 4, 1.0), ({"count": 2}, 1, 0.5), ({"count": 1, "most": 4}, 2, 0.5), ({"gpus": 0}, 4, 0.0)],
)
def test_replicas_of_the_image_service_share_what_is_there(settings: dict, gpus: int, share: float) -> None:
    placed = ReplicaSettings(**settings).on(gpus)
    assert (placed.gpus, placed.has_gpu) == (share, share > 0)
