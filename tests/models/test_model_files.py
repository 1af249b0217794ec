"""Which files are meant, and what they state: the check before loading and the loaders decide alike."""

from __future__ import annotations

import json
import os

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from flashdmd_ray.config import parse_config
from flashdmd_ray.models import family_class
from flashdmd_ray.models.headers import ModelFileError, read_header
from flashdmd_ray.models.locations import HubPath, explain
from flashdmd_ray.models.teacher_files import teacher_files
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, choose, weight_files
from tests.model_folders import write_model
from tests.tiny import sdxl_pipeline, tiny_vae, write_single_file


def checked(path, **model):
    tree = {"model": {"teacher": str(path), **model}, "rewards": [{"kind": "pickscore"}]}
    config = parse_config(tree)
    found = teacher_files(config).parameters
    try_loading(config)
    return found


def loaded(path, parts=("denoiser", "vae", "text"), **model):
    return family_class("sdxl").from_pretrained(str(path), parts=parts, **model)


def refused(path, match, **model):
    """By the check and by the loader, each in one line."""
    for read in (checked, loaded):
        with pytest.raises(ValueError, match=match) as caught:
            read(path, **model)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def pipeline():
    return sdxl_pipeline()


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    pipeline.save_pretrained(root)
    return root


def weights(root):
    return loaded(root).teacher.state_dict()


def test_a_variant_is_taken_where_only_it_is_there(whole, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert checked(tmp_path) == checked(whole)
    assert all(map(torch.equal, weights(tmp_path).values(), weights(whole).values()))
    unet = tmp_path / "unet"
    os.link(unet / f"{DIFFUSERS}.fp16.safetensors", unet / f"{DIFFUSERS}.bf16.safetensors")
    refused(tmp_path, "the variants bf16 and fp16 of the weights and no plain ones")


def test_shards_are_whole_or_refused(whole, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert checked(tmp_path) == checked(whole)
    assert all(map(torch.equal, weights(tmp_path).values(), weights(whole).values()))
    shards[-1].unlink()
    refused(tmp_path, rf"{shards[-1].name} is missing \(1 of {len(shards)} shards\)")
    (tmp_path / "unet" / f"{DIFFUSERS}.safetensors.index.json").unlink()
    refused(tmp_path, "index.json; download it")


def test_the_file_that_the_libraries_would_open():
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ]
    assert choose(names, TRANSFORMERS, "x").file == "model.safetensors"
    both = [name.replace("model", DIFFUSERS) for name in names]
    assert choose(both, DIFFUSERS, "x").file.endswith("index.json")
    cases = {
        "pytorch_model.bin": "only pytorch_model.bin",
        "other.safetensors": "no model.safetensors",
        "": "no .safetensors file",
    }
    for name, said in cases.items():
        with pytest.raises(ModelFileError, match=said):
            choose([name], TRANSFORMERS, "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "damaged"),
    ],
)
def test_what_stands_in_for_weights_is_named(content, said, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match=said):
        read_header(file)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelFileError, match="link to a file that is gone"):
        weight_files(tmp_path, TRANSFORMERS)


QUANTISED = {
    "scaled fp8": {"a.weight": torch.zeros(2, dtype=torch.float8_e4m3fn), "a.scale_weight": torch.ones(1)},
    "int8": {"a.weight": torch.zeros(2, dtype=torch.int8)},
    "bitsandbytes": {"a.weight": torch.zeros(2), "a.weight.absmax": torch.zeros(1)},
    "quanto": {"a.weight._data": torch.zeros(2), "a.weight._scale": torch.zeros(1)},
}


@pytest.mark.parametrize("kind", list(QUANTISED))
def test_weights_that_need_others_beside_them_are_refused(kind, tmp_path):
    save_file(QUANTISED[kind], tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match="quantised"):
        weight_files(tmp_path, TRANSFORMERS)


def test_a_wrapped_module_is_named_and_plain_eight_bits_are_read(whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    file = tmp_path / "unet" / f"{DIFFUSERS}.safetensors"
    state = load_file(file)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, file)
    read = weights(tmp_path)
    for name, value in state.items():
        assert torch.equal(read[f"unet.{name}"], value.to(torch.float8_e4m3fn).float())
    save_file({f"_orig_mod.{name}": value for name, value in state.items()}, file)
    refused(tmp_path, "all names start with '_orig_mod.'")
    save_file(state | {"more.weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"weights in it are of another model, first 'more\.weight'"):
        loaded(tmp_path)


@pytest.fixture(scope="module")
def file(pipeline, tmp_path_factory):
    return write_single_file(pipeline, "sdxl", tmp_path_factory.mktemp("file") / "model.safetensors")


def rewritten(file, path, changes, metadata=None):
    save_file(load_file(file) | changes, path, metadata=metadata)
    return path


@pytest.mark.parametrize("stated", ["markers", "modelspec"])
def test_a_file_that_states_v_prediction_is_read_so(stated, file, whole, tmp_path):
    markers = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)} if stated == "markers" else {}
    metadata = None if markers else {"modelspec.prediction_type": "V-Prediction"}
    path = rewritten(file, tmp_path / "v.safetensors", markers, metadata)
    assert checked(path, teacher_config=str(whole)) == checked(file, teacher_config=str(whole))
    family = loaded(path, parts=(), teacher_config=str(whole))
    assert family.schedule.prediction_type == "v_prediction"
    last = family.schedule.coefficients(torch.tensor([999]))[0]
    assert (last == 0) == (stated == "markers")
    assert family.scheduler_config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize(
    ("changes", "metadata", "said"),
    [
        ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, None, "EDM form"),
        ({}, {"modelspec.prediction_type": "sample"}, "states prediction type 'sample'"),
        ({"lora_unet_x.lora_down.weight": torch.zeros(2)}, None, "is a LoRA"),
        ({"control_model.x.weight": torch.zeros(2)}, None, "of no part of the family, first 'control_model.x.weight'"),
    ],
)
def test_files_of_another_kind_are_refused(changes, metadata, said, file, whole, tmp_path):
    path = rewritten(file, tmp_path / "other.safetensors", changes, metadata)
    with pytest.raises(ValueError, match=said):
        checked(path, teacher_config=str(whole))


def rewrite(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(max(state)), "1 weights are missing or of another shape"),
        (lambda state: state.update({max(state): torch.zeros(2, 3, 5)}), "1 weights are missing or of another shape"),
        (
            lambda state: state.update({"more.weight": torch.zeros(2)}),
            r"1 weights in it are of another model, first 'more\.weight'",
        ),
    ],
)
def test_weights_are_those_that_config_json_describes(change, said, part, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    rewrite(next((tmp_path / part).glob("*.safetensors")), change)
    refused(tmp_path, f"cannot load {part} from {tmp_path}: {said}")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet", "layers_per_block", 2),
        ("text_encoder", "intermediate_size", 99),
        ("text_encoder_2", "num_hidden_layers", 3),
    ],
)
def test_a_config_of_another_network_is_refused(name, key, value, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(tmp_path, f"cannot load {name} from .* weights are missing or of another shape than config.json says")


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("unet", "_class_name", "ControlNetModel", "describes a ControlNetModel, not a UNet2DConditionModel"),
        ("unet", "sample_size", "8", "has sample_size '8'"),
        ("unet", "cross_attention_dim", 32, "reads texts of width 32, its text encoders' hidden_size make 24"),
        ("text_encoder_2", "projection_dim", 8, "reads texts of width 16, its text encoders' projection_dim make 8"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(name, key, value, said, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda names: names.pop(min(names)), "a shard has 'add_embedding.linear_1.bias', it does not list it"),
        (lambda names: names.update({"a": names[min(names)]}), "it lists 'a', no shard has it"),
    ],
)
def test_an_index_of_other_shards_is_refused(change, said, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, max_shard_size="60KB")
    index = next((tmp_path / "unet").glob("*.index.json"))
    tree = json.loads(index.read_text())
    change(tree["weight_map"])
    index.write_text(json.dumps(tree))
    refused(tmp_path, said)


def test_a_vae_with_names_of_older_versions_is_read(whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(state):
        for name in list(state):
            for new, old in older.items():
                if f".{new}." in name:
                    state[name.replace(f".{new}.", f".{old}.")] = state.pop(name)

    rewrite(next((tmp_path / "vae").glob("*.safetensors")), rename)
    assert checked(tmp_path) == checked(whole)
    theirs = loaded(whole).vae.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in loaded(tmp_path).vae.state_dict().items())


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "conditioner.embedders.1."])
def test_weights_of_a_single_file_are_those_of_the_configuration(part, file, whole, tmp_path):
    names = sorted(name for name in load_file(file) if name.startswith(part) and name.endswith(".bias"))
    for change in (lambda state: state.pop(names[-1]), lambda state: state.update({names[0]: torch.zeros(999)})):
        rewrite(os.fspath(rewritten(file, tmp_path / "other.safetensors", {})), change)
        refused(tmp_path / "other.safetensors", "cannot load", teacher_config=str(whole))


def test_unread_weights_of_a_single_file_are_an_error(file, whole, tmp_path):
    name = "model.diffusion_model.input_blocks.1.0.extra.weight"
    path = rewritten(file, tmp_path / "more.safetensors", {name: torch.zeros(3)})
    with pytest.raises(ValueError, match="values of this part"):
        loaded(path, teacher_config=str(whole))
    scaled = rewritten(file, tmp_path / "scaled.safetensors", {"scaled_fp8": torch.zeros(1)})
    refused(scaled, "quantised or scaled", teacher_config=str(whole))


def test_statistics_of_a_vae_are_those_of_the_stock_pipeline(whole, tmp_path):
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 0.25]
    torch.manual_seed(3)
    vae = tiny_vae(latents_mean=mean, latents_std=deviation).eval()
    os.system(f"cp -r {whole}/. {tmp_path}")
    vae.save_pretrained(tmp_path / "vae")
    refused(whole, "latents_mean", vae=str(tmp_path / "vae"))
    family = loaded(tmp_path, parts=("vae",))
    latents = torch.randn(1, 4, 8, 8)
    shape = (1, 4, 1, 1)
    with torch.no_grad():
        own = latents * torch.tensor(deviation).view(shape) / 0.5 + torch.tensor(mean).view(shape)
        images = vae.decode(own).sample
        torch.testing.assert_close(family.decode(latents), images)
        again = family.encode_images(images)
        expected = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(
        again, (expected - torch.tensor(mean).view(shape)) * 0.5 / torch.tensor(deviation).view(shape)
    )
    assert checked(tmp_path, vae=str(tmp_path / "vae"))["vae"] == sum(p.numel() for p in vae.parameters())
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    with pytest.raises(ValueError, match=r"model\.vae: .*describes a AutoencoderTiny"):
        checked(whole, vae=str(tmp_path / "vae"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling_factor": 0.9}, r"has scaling_factor 0\.9, the teacher's VAE 0\.5"),
        ({"scaling_factor": ...}, r"has scaling_factor 0\.18215, the teacher's"),
        ({"block_out_channels": [8, 8, 8]}, "a latent of .* spans 4 pixels, one of the teacher's VAE 2"),
        ({"block_out_channels": 8}, "has block_out_channels 8"),
    ],
)
def test_a_vae_of_another_latent_space_is_refused(changes, said, whole, tmp_path):
    os.system(f"cp -r {whole}/vae/. {tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(whole, said, vae=str(tmp_path))


def test_a_vae_in_one_file(file, whole, tmp_path):
    vae = {name: value for name, value in load_file(file).items() if name.startswith("first_stage_model.")}
    save_file(
        {name.removeprefix("first_stage_model."): value for name, value in vae.items()}, tmp_path / "vae.safetensors"
    )
    path = str(tmp_path / "vae.safetensors")
    assert checked(whole, vae=path) == checked(whole)
    other = loaded(whole, parts=("vae",), vae=path).vae.state_dict()
    assert all(map(torch.equal, other.values(), loaded(whole, parts=("vae",)).vae.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type 'sample' is not supported"),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True, "needs a v-prediction network"),
        ("unet/config.json", "time_cond_proj_dim", 256, "time_cond_proj_dim 256"),
        ("unet/config.json", "in_channels", 9, "4 latent channels, the teacher 9"),
        ("text_encoder/config.json", "quantization_config", {"quant_method": "bitsandbytes"}, "quantised weights"),
    ],
)
def test_configurations_that_would_be_ignored_are_refused(name, key, value, said, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=said):
        checked(tmp_path)
    with pytest.raises(ValueError, match=r"cannot load|the scheduler"):
        loaded(tmp_path, parts=("denoiser", "text"))


def test_the_hub_cache_is_read_by_its_references(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--somebody--mine"
    for name in ("aaaa", "bbbb"):
        (cache / "snapshots" / name).mkdir(parents=True)
    os.system(f"cp -r {whole}/. {cache}/snapshots/aaaa")
    (cache / "snapshots" / "bbbb" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    os.utime(cache / "snapshots" / "aaaa", (1, 1))
    assert HubPath("somebody/mine").snapshot() == cache / "snapshots" / "bbbb"
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaa")
    assert checked("somebody/mine") == checked(whole)
    assert all(map(torch.equal, weights("somebody/mine").values(), weights(whole).values()))
    assert checked("somebody/mine@aaaa") == checked(whole)
    refused("somebody/mine@bbbb", "is missing")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("https://huggingface.co/owner/name/tree/main", "write the hub id owner/name"),
        ("model.ckpt", "pickled"),
        ("model.gguf", "GGUF"),
        ("model.zip", "archive"),
        ("nowhere", "no such directory"),
    ],
)
def test_paths_that_are_no_model_say_why(name, said, tmp_path):
    path = name if "://" in name else tmp_path / name
    if name.startswith("model."):
        path.write_bytes(b"x")
    assert said in explain(str(path))


def test_a_missing_tokenizer_is_found_before_loading(whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    for entry in (tmp_path / "tokenizer_2").iterdir():
        if entry.name != "tokenizer_config.json":
            entry.unlink()
    with pytest.raises(ValueError, match=r"tokenizer_2 has no tokenizer"):
        checked(tmp_path)


def test_a_module_in_another_library_s_name_is_refused(tmp_path):
    write_model(tmp_path / "unet", 20)
    with pytest.raises(ModelFileError, match=r"holds model\.safetensors, but no diffusion_pytorch_model\.safetensors"):
        weight_files(tmp_path / "unet", DIFFUSERS)
    assert sum(weight_files(tmp_path / "unet", TRANSFORMERS).sizes.values()) == 20


@pytest.mark.parametrize(
    ("part", "prefix"), [("unet", "unet."), ("vae", "model."), ("text_encoder", "module._orig_mod.")]
)
def test_names_that_all_start_alike_are_a_wrapper_s(part, prefix, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    file = next((tmp_path / part).glob("*.safetensors"))
    save_file({f"{prefix}{name}": value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"module around the network \(all names start with '{prefix}'\)"):
        checked(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("unet", "sample_size", [8, 8]), ("vae", "block_out_channels", 8), ("vae", "scaling_factor", None)],
)
def test_numbers_of_another_form_are_named(name, key, value, whole, tmp_path):
    os.system(f"cp -r {whole}/. {tmp_path}")
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"has {key} "):
        checked(tmp_path)
