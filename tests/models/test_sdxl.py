"""What all families share, on SDXL: parts, caching, decoding, trainable copies, damage. Parity: test_families.py."""

import shutil

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from flashdmd_ray.models.family import TextTowers
from flashdmd_ray.models.sdxl import SDXL
from tests.tiny import save_sdxl

TEXTS = ["a red 4 on a gray background", "two 7s", "", "a very long prompt that is cut after a few letters"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl")
    return save_sdxl(path, prediction_type=request.param, zeros=request.param == "epsilon")


@pytest.fixture(scope="module")
def family(directory):
    return SDXL.from_pretrained(str(directory))


@pytest.fixture(scope="module")
def pipeline(directory):
    loaded = StableDiffusionXLPipeline.from_pretrained(directory, use_safetensors=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_shapes(family):
    assert family.latent_shape == (4, 8, 8)
    assert family.image_size == (16, 16)
    assert not any(p.requires_grad for module in (family.teacher, family.vae, family.text) for p in module.parameters())
    assert not family.teacher.training


def test_an_embedding_does_not_depend_on_its_neighbours_or_on_the_cache(directory, monkeypatch):
    texts = [f"prompt {i}" for i in range(11)]
    together = SDXL.from_pretrained(str(directory), parts=["text"]).encode(texts)
    monkeypatch.setattr(TextTowers, "CACHE_BYTES", 3 * 4 * (12 * 24 + 16))  # room for three prompts
    family = SDXL.from_pretrained(str(directory), parts=["text"])
    for i in reversed(range(11)):
        assert torch.equal(family.encode([texts[i], texts[0]]).prompt_embeds[0], together.prompt_embeds[i])
        assert torch.equal(family.encode([texts[i]]).pooled[0], together.pooled[i])
    assert len(family.text._cache) == 3


def test_decoding_is_that_of_the_stock_pipeline_and_differentiable(family, pipeline):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    images = family.decode(latents)
    stock = pipeline.vae.decode(latents.detach() / 0.5).sample
    torch.testing.assert_close(images, stock)
    (gradient,) = torch.autograd.grad(images.pow(2).sum(), latents)
    family.checkpoint_decoder()
    (again,) = torch.autograd.grad(family.decode(latents).pow(2).sum(), latents)
    family.vae.disable_gradient_checkpointing()
    torch.testing.assert_close(gradient, again)
    assert gradient.abs().min() > 0
    assert all(p.grad is None for p in family.vae.parameters())


def test_encoding_images(family):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = family.vae.encode(images).latent_dist
    noise = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(family.encode_images(images), posterior.mean * 0.5)
    torch.testing.assert_close(family.encode_images(images, noise), (posterior.mean + posterior.std * noise) * 0.5)


def test_a_denoiser_is_a_trainable_copy(family):
    student = family.denoiser()
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    conditioning = family.encode(TEXTS[:2])
    torch.testing.assert_close(student(noisy, t, conditioning), family.teacher(noisy, t, conditioning))
    student(noisy, t, conditioning).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(not torch.equal(a, b) for a, b in zip(student.parameters(), family.teacher.parameters(), strict=True))


def test_mid_features_are_the_mid_blocks_output(family):
    student, seen = family.denoiser(), []
    noisy, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([999, 249]), family.encode(TEXTS[:2])
    features = student.mid_features(noisy, t, conditioning)
    assert features.shape == (2, family.mid_width, 4, 4)
    student.unet.mid_block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    prediction = student(noisy, t, conditioning)  # the hook of mid_features is gone
    torch.testing.assert_close(features, seen[0])
    assert prediction.shape == noisy.shape
    features.sum().backward()
    assert student.unet.conv_in.weight.grad is not None
    assert student.unet.conv_out.weight.grad is None


def test_conditioning_rows():
    family_rows = torch.arange(3.0)[:, None]
    from flashdmd_ray.models.denoiser import Conditioning

    rows = Conditioning(family_rows[:, :, None].expand(3, 5, 2), family_rows, family_rows.expand(3, 6))
    assert rows.repeat_interleave(2).pooled[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.index_select(torch.tensor([2, 0])).prompt_embeds[:, 0, 0].tolist() == [2, 0]
    assert len(rows[1:]) == 2
    assert Conditioning.concat([rows[:1], rows[1:]]).pooled.tolist() == rows.pooled.tolist()


def test_parts_are_loaded_selectively(directory):
    family = SDXL.from_pretrained(str(directory), parts=["vae"])
    assert family.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    with pytest.raises(AttributeError, match=r"'denoiser'.*not loaded in this process"):
        _ = family.teacher
    vae = family.vae
    assert family.load(["vae", "denoiser"]).vae is vae, "what is there is not loaded again"
    assert not any(parameter.requires_grad for parameter in family.teacher.parameters())


def break_nothing_there(path):
    shutil.rmtree(path)


def break_truncated(path):
    weights = path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def break_no_text_weights(path):
    (path / "text_encoder" / "model.safetensors").unlink()


def break_json(path):
    (path / "vae" / "config.json").write_text("{")


def break_other_family(path):
    index = path / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "StableDiffusion3Pipeline"))


def break_incomplete_weights(path):
    from safetensors.torch import load_file, save_file

    file = path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def break_tokenizer(path):
    shutil.rmtree(path / "tokenizer_2")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_nothing_there, "no such directory"),
        (break_truncated, "unet"),
        (break_no_text_weights, "text_encoder"),
        (break_json, "vae"),
        (break_other_family, "StableDiffusion3Pipeline"),
        (break_incomplete_weights, "text_projection.weight"),
        (break_tokenizer, "tokenizer_2"),
    ],
)
def test_damage_is_one_line_that_names_the_path(damage, says, tmp_path):
    path = save_sdxl(tmp_path / "sdxl")
    damage(path)
    with pytest.raises(ValueError, match=says) as caught:
        SDXL.from_pretrained(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
