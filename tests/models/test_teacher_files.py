"""Teachers of every family before anything is loaded: directories, single files, T5, another VAE."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from flashdmd_ray.config import parse_config
from flashdmd_ray.models import teacher_files
from tests.model_folders import write_model, write_tokenizer

SETTINGS = {"rewards": [{"kind": "pickscore"}]}
SD3_PARTS = {"transformer": 1000, "vae": 200, "text_encoder": 30, "text_encoder_2": 40, "text_encoder_3": 500}

MODULES = dict.fromkeys(("transformer", "unet", "vae"), "diffusion_pytorch_model.safetensors")


def configured(**model):
    return parse_config(SETTINGS | {"model": model})


def counts(**model):
    return teacher_files.teacher_files(configured(**model)).parameters


def write_sd3(folder, t5=True):
    """A StableDiffusion3Pipeline directory without a T5, or with."""
    for part, parameters in SD3_PARTS.items():
        if t5 or part != "text_encoder_3":
            write_model(folder / part, parameters, MODULES.get(part, "model.safetensors"))
            if part not in MODULES:
                write_tokenizer(folder / part.replace("text_encoder", "tokenizer"))
    encoder_3 = ["transformers", "T5EncoderModel"] if t5 else [None, None]
    write_json(folder / "model_index.json", _class_name="StableDiffusion3Pipeline", text_encoder_3=encoder_3)
    transformer = {"sample_size": 8, "in_channels": 4, "patch_size": 2, "pos_embed_max_size": 6}
    write_json(folder / "transformer" / "config.json", **transformer)
    write_json(folder / "vae" / "config.json", block_out_channels=[8, 8])
    write_json(folder / "scheduler" / "scheduler_config.json", shift=3.0)
    return folder


def write_json(path, **tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def write_file(path, **sizes):
    """A single file; `sizes` are parameters by how the names of their weights start ('_' for '.')."""
    names = {name.replace("__", "."): np.zeros(size, np.float16) for name, size in sizes.items()}
    save_file(names, path)
    return path


def test_sd3_counts_its_transformer_and_the_t5_only_on_request(tmp_path):
    root = str(write_sd3(tmp_path / "sd3"))
    found = counts(family="sd3", teacher=root)
    assert found == {"denoiser": 1000, "vae": 200, "text_encoder": 30, "text_encoder_2": 40}
    assert counts(family="sd3", teacher=root, t5=True) == found | {"text_encoder_3": 500}
    without = str(write_sd3(tmp_path / "small", t5=False))
    assert counts(family="sd3", teacher=without) == found
    with pytest.raises(ValueError, match=r"model\.t5|text_encoder_3"):
        counts(family="sd3", teacher=without, t5=True)


def test_a_resolution_that_does_not_fit_is_found_before_loading(tmp_path):
    root = str(write_sd3(tmp_path / "sd3"))
    assert counts(family="sd3", teacher=root, resolution=[24, 12])
    with pytest.raises(ValueError, match=r"model\.resolution: \[24, 14\] must be multiples of 4"):
        counts(family="sd3", teacher=root, resolution=[24, 14])


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_teacher_of_another_family_is_refused(family, tmp_path):
    root = write_sd3(tmp_path / "sd3")
    write_model(root / "unet", 100, MODULES["unet"])
    write_json(root / "unet" / "config.json", sample_size=8, in_channels=4)
    with pytest.raises(ValueError, match=rf"holds a StableDiffusion3Pipeline, but model\.family '{family}'"):
        counts(family=family, teacher=str(root))


def test_another_vae_is_counted_instead(tmp_path):
    root = str(write_sd3(tmp_path / "sd3"))
    vae = write_model(tmp_path / "vae", 77, MODULES["vae"])
    write_json(vae / "config.json", block_out_channels=[8, 8], latent_channels=4)
    assert counts(family="sd3", teacher=root, vae=str(vae))["vae"] == 77
    (vae / MODULES["vae"]).unlink()
    with pytest.raises(ValueError, match=r"model\.vae: .*vae has no \.safetensors file"):
        counts(family="sd3", teacher=root, vae=str(vae))
    with pytest.raises(ValueError, match=r"model\.vae: no such directory: 'demo'; correct the path$"):
        counts(family="sd3", teacher=root, vae="demo")


SINGLE_FILES = {
    "sdxl": {"model__diffusion_model__a": 1000, "first_stage_model__a": 200}
    | {"conditioner__embedders__0__a": 30, "conditioner__embedders__1__a": 40},
    "sd15": {"model__diffusion_model__a": 1000, "first_stage_model__a": 200, "cond_stage_model__a": 30},
    "sd3": {"model__diffusion_model__a": 1000, "first_stage_model__a": 200}
    | {"text_encoders__clip_l__a": 30, "text_encoders__clip_g__a": 40, "text_encoders__t5xxl__a": 500},
}


@pytest.mark.parametrize("family", list(SINGLE_FILES))
def test_a_single_file_is_counted_from_its_header(family, tmp_path):
    file = write_file(tmp_path / "model.safetensors", **SINGLE_FILES[family])
    found = counts(family=family, teacher=str(file))
    assert found == {"denoiser": 1000, "vae": 200, "text_encoder": 30} | (
        {} if family == "sd15" else {"text_encoder_2": 40}
    )
    if family == "sd3":
        assert counts(family=family, teacher=str(file), t5=True)["text_encoder_3"] == 500
    with file.open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(ValueError, match=r"model\.teacher: .*model\.safetensors is damaged"):
        counts(family=family, teacher=str(file))


def test_what_a_single_file_lacks_is_named(tmp_path):
    file = write_file(tmp_path / "sd3_medium.safetensors", model__diffusion_model__a=1000, first_stage_model__a=200)
    with pytest.raises(
        ValueError, match=r"holds no text_encoder of family 'sd3' \(no weight starts with 'text_encoders\.clip_l\.'\)"
    ):
        counts(family="sd3", teacher=str(file))
    with pytest.raises(ValueError, match=r"model\.teacher: no such file: .*nowhere\.safetensors"):
        counts(family="sd3", teacher=str(tmp_path / "nowhere.safetensors"))


def test_the_configuration_of_a_single_file_is_checked(tmp_path):
    file = str(write_file(tmp_path / "model.safetensors", **SINGLE_FILES["sd15"]))
    root = write_sd3(tmp_path / "sd3")
    with pytest.raises(ValueError, match=r"model\.teacher_config: .*holds a StableDiffusion3Pipeline"):
        counts(family="sd15", teacher=file, teacher_config=str(root))
