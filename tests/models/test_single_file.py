"""Teachers from one .safetensors file in the original layout, against the pipeline that it was written from."""

from functools import partial

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from flashdmd_ray.models import family_class
from tests.tiny import sd3_pipeline, sd15_pipeline, sdxl_pipeline, write_single_file

PIPELINES = {
    "sdxl": sdxl_pipeline,
    "sd15": sd15_pipeline,
    "sd3": sd3_pipeline,
}
LATER = {
    "sd15": partial(sd15_pipeline, activation="gelu"),  # 2.1, whose encoder is an OpenCLIP
    "sd3": partial(sd3_pipeline, t5=True, qk_norm="rms_norm", dual_attention_layers=(0, 1)),  # 3.5
}
NOISY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(PIPELINES))
def written(request, tmp_path_factory):
    """Family, pipeline directory, single file."""
    return write(request.param, PIPELINES[request.param](), tmp_path_factory.mktemp(request.param))


def write(name, pipeline, folder):
    if name == "sd3":
        with torch.no_grad():  # what diffusers takes where the file has no projection
            pipeline.text_encoder.text_projection.weight.copy_(torch.eye(8))
    pipeline.save_pretrained(folder / "pipeline")
    return name, folder / "pipeline", write_single_file(pipeline, name, folder / "model.safetensors")


def test_a_single_file_is_the_pipeline_it_was_written_from(written):
    check_same(*written)


@pytest.mark.parametrize("name", list(LATER))
def test_the_later_models_of_a_family_are_too(name, tmp_path):
    check_same(*write(name, LATER[name](), tmp_path), **({"t5": True} if name == "sd3" else {}))


def check_same(name, directory, file, **settings):
    theirs = family_class(name).from_pretrained(str(directory), **settings)
    ours = family_class(name).from_pretrained(str(file), teacher_config=str(directory), **settings)
    for mine, original in ((ours.teacher, theirs.teacher), (ours.vae, theirs.vae), (ours.text, theirs.text)):
        expected = original.state_dict()
        assert mine.state_dict().keys() == expected.keys()
        for key, tensor in mine.state_dict().items():
            assert torch.equal(tensor, expected[key]), key
    texts = ["a red 4", "two 7s"]
    t = theirs.schedule.network_timestep(torch.tensor([999, 249]))
    assert torch.equal(ours.teacher(NOISY, t, ours.encode(texts)), theirs.teacher(NOISY, t, theirs.encode(texts)))
    assert (ours.latent_shape, ours.scheduler_config) == (theirs.latent_shape, theirs.scheduler_config)
    assert not any(parameter.requires_grad for parameter in ours.teacher.parameters())


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_the_configuration_must_be_named(written, offline, monkeypatch):
    name, _, file = written
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(ValueError, match=r"model\.teacher_config: null takes the configuration of ") as caught:
        family_class(name).from_pretrained(str(file))
    assert "\n" not in str(caught.value)
    assert "set it to a directory or hub id" in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.decoder.mid"])
def test_a_part_that_the_file_lacks_is_never_left_at_random(written, prefix, tmp_path):
    name, directory, file = written
    kept = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(prefix)}
    save_file(kept, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"cannot load (unet|transformer|vae) from .*part\.safetensors") as caught:
        family_class(name).from_pretrained(str(tmp_path / "part.safetensors"), teacher_config=str(directory))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(written, tmp_path):
    name, directory, file = written
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is damaged"):
        family_class(name).from_pretrained(str(tmp_path / "cut.safetensors"), teacher_config=str(directory))
