"""A generator that starts from a student of others."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flashdmd_ray.config import load_config, parse_config
from flashdmd_ray.models import family_class
from flashdmd_ray.models.start_weights import load_start
from flashdmd_ray.roles.networks import trained_network
from tests.tiny import save_sd3, save_sdxl

FORMS = {"sdxl": (save_sdxl, "unet", "unet"), "sd3": (save_sd3, "transformer", "transformer")}


@pytest.fixture(scope="module", params=FORMS)
def family(request, tmp_path_factory):
    save, _, _ = FORMS[request.param]
    path = save(tmp_path_factory.mktemp("teacher") / request.param)
    return family_class(request.param).from_pretrained(str(path), parts=["denoiser"])


def student_of(family) -> dict[str, torch.Tensor]:
    """The teacher's weights, each a little larger."""
    return {name: value * 1.1 for name, value in family.teacher.network.state_dict().items()}


def test_a_directory_and_a_file_of_a_network(family, tmp_path):
    _, folder, _ = FORMS[family.name]
    expected, network = student_of(family), family.denoiser().network
    network.load_state_dict(expected)
    network.save_pretrained(tmp_path / "export" / folder)
    save_file(expected, tmp_path / "student.safetensors")
    torch.save(expected, tmp_path / "student.bin")
    for where in ("export", "student.safetensors", "student.bin"):
        found = load_start(family, str(tmp_path / where))
        assert all(torch.equal(found[name], value) for name, value in expected.items()), where
    config = parse_config(
        {
            "model": {"family": family.name, "teacher": family.path},
            "generator": {"start": str(tmp_path / "export")},
            "rewards": [{"kind": "pickscore"}],
        }
    )
    started = trained_network(config, family, "generator").network.state_dict()
    assert all(torch.equal(started[name], value) for name, value in expected.items())
    score = trained_network(config, family, "score").network.state_dict()
    assert all(torch.equal(score[n], value) for n, value in family.teacher.network.state_dict().items())


def test_a_lora_is_merged(family, tmp_path):
    _, _, prefix = FORMS[family.name]
    teacher = family.teacher.network.state_dict()
    layer = next(name.removesuffix(".weight") for name in teacher if name.endswith("to_q.weight"))
    out, inner = teacher[f"{layer}.weight"].shape
    down, up = torch.randn(2, inner), torch.randn(out, 2)
    lora = {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    found = load_start(family, str(tmp_path / "lora.safetensors"))
    torch.testing.assert_close(found[f"{layer}.weight"], teacher[f"{layer}.weight"] + up @ down)
    assert all(torch.equal(found[name], value) for name, value in teacher.items() if name != f"{layer}.weight")
    assert found.keys() == teacher.keys()
    save_file(lora | {"text_encoder.layer.lora_A.weight": down.clone()}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"generator\.start: .*text encoders"):
        load_start(family, str(tmp_path / "text.safetensors"))


def test_what_is_no_student_is_one_line(family, tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    for where in ("nowhere", "other.safetensors"):
        with pytest.raises(ValueError, match=r"generator\.start: cannot load") as refusal:
            load_start(family, str(tmp_path / where))
        assert "\n" not in str(refusal.value)


def test_an_adapter_has_no_other_start():
    with pytest.raises(ValueError, match=r"generator\.start: an adapter starts on the teacher"):
        load_config(None, ["lora.networks=[generator, score]", "generator.start=somewhere"])
