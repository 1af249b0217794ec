"""A LoRA job on the shipped teacher: resumed it has the bits of one never stopped, and its student leaves in every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, read_state
from flashdmd_ray.commands.export import FOLDERS, export_run
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.results.lora_export import FILES
from flashdmd_ray.roles.generator import AVERAGE
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.training import job

STEPS = 3


def small(root: Path, name: str, steps: int) -> Config:
    tree = {
        "steps": steps,
        "batch": 4,
        "runtime": "local",
        "run": {"dir": str(root), "name": name},
        "lora": {"networks": ["generator", "score"], "rank": 4, "alpha": 8.0},
        "generator": {"lr": 1e-3, "warmup": 0},
        "preference": {"updates": 1, "batch": 2, "start_step": 1, "threshold": 0.0},
        "tracking": {"enabled": False},
        "evaluation": {"samples": 0, "teacher_steps": 2, "student_steps": [4], "ema": 0.5},
    }
    return parse_config(tree)


def state_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == STEPS
    files = ("generator.safetensors", "score_estimator.safetensors", "reference.safetensors", AVERAGE)
    return {f"{file}:{name}": t for file in files for name, t in load_tensors(checkpoint / file).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    assert job.run_job(small(root, "straight", STEPS)) == 0
    return root / "straight"


def test_resumed_equals_never_stopped(finished: Path) -> None:
    for steps in (2, STEPS):
        assert job.run_job(small(finished.parent, "resumed", steps)) == 0
    straight, resumed = state_of(finished), state_of(finished.parent / "resumed")
    assert straight.keys() == resumed.keys()
    assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    assert all(".lora_" in key or ":updates" in key for key in straight)


def test_the_student_leaves_in_every_format(finished: Path) -> None:
    """The merged pipeline is the teacher plus what the LoRA file says; the average is what leaves."""
    written = {form: export_run(finished, "latest", None, form) for form in FOLDERS}
    assert {path.name for path in written.values()} == set(FOLDERS.values())
    family = load_family(small(finished.parent, "straight", STEPS).model)
    merged = load_file(written["pipeline"] / "unet" / "diffusion_pytorch_model.safetensors")
    teacher = family.teacher.network.state_dict()
    adapter, kohya = (load_file(written[form] / FILES[form]) for form in ("lora", "kohya"))
    layers = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    for layer in layers:
        update = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
        name = f"{layer.removeprefix('unet.')}.weight"
        torch.testing.assert_close(merged[name] - teacher[name], update, atol=1e-6, rtol=1e-3)
        assert update.abs().max() > 0
    assert len(kohya) == 3 * len(layers)
    state = state_of(finished)
    name = f"{layers[0]}.lora_A.weight"
    assert torch.equal(adapter[name], state[f"{AVERAGE}:weights/{name}"])
    assert not torch.equal(adapter[name], state[f"generator.safetensors:weights/{name}"])


def test_a_whole_run_has_no_adapter(finished: Path, tmp_path: Path) -> None:
    config = (finished / "config.yaml").read_text(encoding="utf-8")
    whole = config.replace("  - generator\n", "").replace("  - score\n", "").replace("networks:\n", "networks: []\n")
    (tmp_path / "config.yaml").write_text(whole, encoding="utf-8")
    with pytest.raises(ValueError, match=r"--format lora: the generator of .* was trained whole"):
        export_run(tmp_path, "latest", None, "lora")
