"""A generator that starts from a student of others."""

from __future__ import annotations

import pickle

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from flashdmd_ray.config import load_config, parse_config
from flashdmd_ray.models import family_class
from flashdmd_ray.models.start_weights import load_start
from flashdmd_ray.models.trial_loading import try_loading
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
    for start in ("", "base_model.model."):
        save_file(
            {f"{start}{layer}.lora_A.weight": down, f"{start}{layer}.lora_B.weight": up}, tmp_path / "l.safetensors"
        )
        other = load_start(family, str(tmp_path / "l.safetensors"))
        assert torch.equal(other[f"{layer}.weight"], found[f"{layer}.weight"]), start or "names of the network itself"
    save_file(lora | {"text_encoder.layer.lora_A.weight": down.clone()}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"generator\.start: .*text encoders"):
        load_start(family, str(tmp_path / "text.safetensors"))


def test_a_file_in_the_hub_s_cache(family, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--students" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    save_file(student_of(family), folder / "4step.safetensors")
    found = load_start(family, "somebody/students/4step.safetensors")
    assert all(torch.equal(found[name], value) for name, value in student_of(family).items())


def wrapped(family, tmp_path):
    """A Lightning checkpoint: {"state_dict": {"model.x": ...}}."""
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in student_of(family).items()}}, tmp_path / "s.pt"
    )


def lora_of(layer, out, inner, more="", rank=2):
    def write(family, tmp_path):
        _, _, prefix = FORMS[family.name]
        name = next(name for name in family.teacher.network.state_dict() if name.endswith("to_q.weight"))
        where = f"{prefix}.{layer or name.removesuffix('.weight')}"
        own_out, own_inner = family.teacher.network.state_dict()[name].shape
        down, up = torch.randn(2, inner or own_inner), torch.randn(out or own_out, rank)
        extra = {f"{prefix}.{more}": torch.ones(2)} if more else {}
        save_file({f"{where}.lora_A.weight": down, f"{where}.lora_B.weight": up, **extra}, tmp_path / "s.safetensors")

    return write


def another_network(family, tmp_path):
    _, folder, _ = FORMS[family.name]
    weights = student_of(family)
    network = family.denoiser().network
    config = dict(network.config) | {"in_channels": 5, "out_channels": 5}
    other = type(network).from_config(config)
    other.save_pretrained(tmp_path / "s" / folder)
    assert weights.keys() == other.state_dict().keys()


STARTS = {
    "a wrapped torch file": ("s.pt", wrapped, None),
    "nothing": ("nowhere", lambda *_: None, r"no such directory"),
    "one weight": (
        "s.safetensors",
        lambda _, at: save_file({"weight": torch.ones(1)}, at / "s.safetensors"),
        "lacks weight",
    ),
    "a file cut short": ("s.safetensors", lambda _, at: (at / "s.safetensors").write_bytes(b"12"), "is damaged"),
    "a pickle": (
        "s.pt",
        lambda _, at: (at / "s.pt").write_bytes(pickle.dumps(print, 2)),
        "convert that to safetensors",
    ),
    "another network": ("s", another_network, r"is \(\d+, 5, .*the model needs"),
    "a LoRA of another layer": ("s.safetensors", lora_of("nowhere", 8, 8), "changes a layer that this teacher has not"),
    "more than a LoRA": ("s.safetensors", lora_of("", None, None, "norm.weight"), "is no matrix of a low-rank adapter"),
    "a LoRA of two ranks": ("s.safetensors", lora_of("", None, None, rank=3), "do not fit each other"),
    "a LoRA of another size": ("s.safetensors", lora_of("", 7, 9), r"is \(2, 9\), the layer \("),
}


@pytest.mark.parametrize("what", STARTS)
def test_what_is_no_student_is_one_line_before_and_while_loading(what, family, tmp_path):
    where, write, said = STARTS[what]
    write(family, tmp_path)
    model = {"family": family.name, "teacher": family.path}
    config = parse_config(
        {"model": model, "generator": {"start": str(tmp_path / where)}, "rewards": [{"kind": "pickscore"}]}
    )
    for read in (
        lambda config: try_loading(config, start=config.generator.start),
        lambda _: load_start(family, str(tmp_path / where)),
    ):
        if said is None:
            read(config)
        else:
            with pytest.raises(ValueError, match=rf"^generator\.start: .*{said}") as refusal:
                read(config)
            assert "\n" not in str(refusal.value)


def test_an_adapter_has_no_other_start():
    with pytest.raises(ValueError, match=r"generator\.start: an adapter starts on the teacher"):
        load_config(None, ["lora.networks=[generator, score]", "generator.start=somewhere"])
