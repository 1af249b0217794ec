"""The settings of the model section: resolution, another VAE, bfloat16, T5, micro-conditioning."""

import pytest
import torch

from flashdmd_ray.config import parse_config
from flashdmd_ray.models.sd3 import SD3
from flashdmd_ray.models.sd15 import SD15
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.roles.networks import x0_predictor
from tests.tiny import LENGTH, save_sd3, save_sd15, save_sdxl, tiny_vae


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return str(save_sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return str(save_sd3(tmp_path_factory.mktemp("sd3")))


def test_resolution_and_micro_conditioning(sdxl):
    family = SDXL.from_pretrained(sdxl, resolution=[24, 16])
    assert (family.image_size, family.latent_shape) == ((24, 16), (4, 12, 8))
    assert family.encode(["a"]).time_ids.tolist() == [[24, 16, 0, 0, 24, 16]]
    with torch.no_grad():
        conditioning = family.encode(["a"])
        x0 = x0_predictor(family.teacher, family.schedule, conditioning)(torch.randn(1, 4, 12, 8), torch.tensor([999]))
        assert family.decode(x0).shape == (1, 3, 24, 16)

    cropped = SDXL.from_pretrained(sdxl, parts=["text"], original_size=[40, 30], crop=[8, 2])
    for conditioning in (cropped.encode(["a"]), cropped.unconditional(1)):
        assert conditioning.time_ids.tolist() == [[40, 30, 8, 2, 16, 16]]


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ([25, 16], r"\[25, 16\] must be multiples of 4"),
        ([28, 16], r"\[28, 16\] is larger than this teacher's 24 pixels"),
    ],
)
def test_a_resolution_that_does_not_fit_is_refused(sd3, resolution, message):
    assert SD3.from_pretrained(sd3, parts=[], resolution=[24, 16]).latent_shape == (4, 12, 8)
    with pytest.raises(ValueError, match=r"model\.resolution: " + message):
        SD3.from_pretrained(sd3, parts=[], resolution=resolution)


def test_another_vae_takes_the_place_of_the_teachers(sdxl, tmp_path):
    torch.manual_seed(7)
    other = tiny_vae()
    other.save_pretrained(tmp_path / "vae")
    family = SDXL.from_pretrained(sdxl, vae=str(tmp_path / "vae"))
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        scaled = latents / other.config.scaling_factor
        torch.testing.assert_close(family.decode(latents), other.eval().decode(scaled).sample)

    tiny_vae(channels=3).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"model\.vae: .*other has 3 latent channels, the teacher 4"):
        SDXL.from_pretrained(sdxl, vae=str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"cannot load the VAE from /no/where"):
        SDXL.from_pretrained(sdxl, vae="/no/where")


def test_frozen_parts_in_bfloat16_leave_what_is_trained_in_float32(sdxl):
    exact, family = SDXL.from_pretrained(sdxl), SDXL.from_pretrained(sdxl, dtype="bfloat16")
    for module in (family.teacher, family.vae, family.text):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in family.denoiser().parameters()} == {torch.float32}
    conditioning = family.encode(["a red 4"])
    assert {conditioning.prompt_embeds.dtype, conditioning.pooled.dtype} == {torch.float32}
    assert family.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32
    noisy, t = torch.randn(1, 4, 8, 8), torch.tensor([499])
    with torch.no_grad():
        ours = family.teacher(noisy, t, conditioning)
        theirs = exact.teacher(noisy, t, exact.encode(["a red 4"]))
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.05


def test_sd3_reads_zeros_where_the_t5_is_left_out(tmp_path):
    path = str(save_sd3(tmp_path / "sd3", t5=True))
    without, with_t5 = SD3.from_pretrained(path, parts=["text"]), SD3.from_pretrained(path, parts=["text"], t5=True)
    zeros, full = without.encode(["a red 4"]), with_t5.encode(["a red 4"])
    assert zeros.prompt_embeds.shape == (1, LENGTH + LENGTH, 32)
    assert full.prompt_embeds.shape == (1, LENGTH + 256, 32)
    assert not zeros.prompt_embeds[:, LENGTH:].any()
    assert torch.equal(zeros.prompt_embeds[:, :LENGTH], full.prompt_embeds[:, :LENGTH])
    assert torch.equal(zeros.pooled, full.pooled)
    assert (without.load_settings(), with_t5.load_settings()) == ({"text_encoder_3": None, "tokenizer_3": None}, {})


def test_a_t5_that_is_not_there_is_refused(sd3):
    with pytest.raises(ValueError, match=r"model\.t5: .* has no text_encoder_3; set it to false"):
        SD3.from_pretrained(sd3, parts=["text"], t5=True)


def test_sd15_has_no_pooled_embedding(tmp_path):
    family = SD15.from_pretrained(str(save_sd15(tmp_path / "sd15")), parts=["text"])
    conditioning = family.encode(["a", "b"])
    assert (conditioning.pooled, conditioning.time_ids) == (None, None)
    both = type(conditioning).concat([conditioning[:1], conditioning.repeat_interleave(2)])
    assert (len(both), both.pooled) == (5, None)
    with pytest.raises(ValueError, match="has no pooled prompt embedding"):
        _ = family.pooled_width


SOMEWHERE = {"teacher": "some/where"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"family": "sd15"}},
            r"model: teacher: the package has no demo weights of family 'sd15'; name a teacher",
        ),
        ({"model": {"t5": True}}, r"model: t5: family 'sdxl' has no T5"),
        ({"model": {"family": "sd3", "crop": [0, 0]}}, "family 'sd3' has no micro-conditioning"),
        ({"model": {"teacher_config": "some/where"}}, "teacher_config: goes with a single .safetensors file"),
        (
            {"model": {"family": "sd3"}},
            r"rewards\.1\.path: the packaged latent reward reads latents of the packaged model\.family 'sdxl', not 'sd3'",
        ),
        (
            {
                "model": SOMEWHERE | {"family": "sd15"},
                "rewards": [{"kind": "pickscore"}],
                "adversarial": {"prompt_projection": True},
            },
            r"adversarial\.prompt_projection: model\.family 'sd15' has no pooled prompt embedding",
        ),
        ({"model": {"family": "sd21"}}, r"model\.family: .*'sd21'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse_config(settings)
