"""Teachers from one .safetensors file in the original layout, against the pipeline that it was written from."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdmd_ray.models import family_class
from tests.original_layout import write_sd3, write_sd15, write_sdxl
from tests.tiny import sd3_pipeline, sd15_pipeline, sdxl_pipeline

WRITERS = {
    "sdxl": (sdxl_pipeline, write_sdxl),
    "sd15": (sd15_pipeline, write_sd15),
    "sd3": (sd3_pipeline, write_sd3),
}
NOISY = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(WRITERS))
def written(request, tmp_path_factory):
    """Family, pipeline directory, single file."""
    make, write = WRITERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = make()
    if request.param == "sd3":
        with torch.no_grad():  # what diffusers takes where the file has no projection
            pipeline.text_encoder.text_projection.weight.copy_(torch.eye(8))
    pipeline.save_pretrained(folder / "pipeline")
    return request.param, folder / "pipeline", write(pipeline, folder / "model.safetensors")


def test_a_single_file_is_the_pipeline_it_was_written_from(written):
    name, directory, file = written
    theirs = family_class(name).from_pretrained(str(directory))
    ours = family_class(name).from_pretrained(str(file), teacher_config=str(directory))
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


def test_without_a_hub_the_configuration_must_be_named(written, monkeypatch):
    name, _, file = written
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
