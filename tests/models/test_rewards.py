"""Rewards: PickScore's formula against the stock model and processor, and the registry."""

import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig

from flashdmd_ray.config import LATER_REWARD_KINDS, REWARD_KINDS
from flashdmd_ray.models import rewards
from flashdmd_ray.models.latent_reward import LatentRewardModel, UNetLatentReward, save_latent_reward
from flashdmd_ray.models.rewards import PixelReward, build_reward
from tests.tiny import sdxl_pipeline, text_config, tokenizer

SIDE = 12
TEXTS = ["a red 4", "two blue 7s left of a cup that goes on and on", "", "a red 4", "x"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random CLIPModel in PickScore's format, with an argmax-EOT text tower as the published one has."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        projection_dim=8,
    )
    text = text_config(16, len(words))
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    clip.save_pretrained(path)
    CLIPProcessor(processor, words).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward(directory):
    return build_reward("pickscore", str(directory))


def bytes_as_images(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def photos(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth uint8 images: a random 3x3 colour field, enlarged."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (smooth * 255).round().byte()


def noise_bytes(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_reward_is_that_of_the_stock_model_and_processor(reward, directory):
    """At the processor's own size nothing is resampled, so the two must agree on any image."""
    pixels = noise_bytes(len(TEXTS), SIDE)
    processor, clip = CLIPProcessor.from_pretrained(directory), CLIPModel.from_pretrained(directory)
    inputs = processor(
        text=TEXTS, images=list(pixels), padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        expected = clip(**inputs).logits_per_image.diagonal()
    torch.testing.assert_close(reward.score(bytes_as_images(pixels), TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01, "the test must tell images apart"


@pytest.mark.parametrize("shape", [(24, 24), (40, 31), (31, 40), (12, 20), (7, 9)])
def test_preprocessing_is_that_of_the_stock_processor(reward, directory, shape):
    """On smooth images, up to the 8 bits that the stock processor rounds to after resizing."""
    pixels = photos(2, *shape)
    expected = CLIPImageProcessor.from_pretrained(directory)(list(pixels), return_tensors="pt").pixel_values
    ours = reward.preprocessing(bytes_as_images(pixels))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.1 / 255 / 0.26


def test_reward_does_not_depend_on_the_batch(reward):
    images = bytes_as_images(noise_bytes(5, 20))
    together = reward.score(images, TEXTS)
    assert together.dtype == torch.float32
    alone = torch.cat([reward.score(images[i : i + 1], TEXTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    reverse = reward.score(images.flip(0), TEXTS[::-1])
    torch.testing.assert_close(together, reverse.flip(0), rtol=1e-5, atol=1e-5)


def test_reward_is_differentiable_in_the_pixels(reward):
    images = (torch.rand(2, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5).float()
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, ["a", "b"]).sum(), images)
    step = 0.02 * gradient / gradient.abs().max()
    with torch.no_grad():
        gain = reward.score(images + step, ["a", "b"]).sum() - reward.score(images - step, ["a", "b"]).sum()
    torch.testing.assert_close(gain, 2 * (step * gradient).sum(), rtol=0.02, atol=0)
    assert all(p.grad is None for p in reward.clip.parameters())


def test_kinds_are_those_of_the_configuration():
    assert tuple(rewards._LOADERS) == REWARD_KINDS


def test_pickscore_is_a_pixel_reward_and_frozen(reward):
    assert isinstance(reward, PixelReward)
    assert not any(p.requires_grad for p in reward.clip.parameters())
    assert not reward.clip.training


def test_latent_reward_is_loaded_frozen(tmp_path):
    pipeline = sdxl_pipeline()
    save_latent_reward(UNetLatentReward.from_unet(pipeline.unet), tmp_path)
    model = build_reward("latent", str(tmp_path))
    assert isinstance(model, LatentRewardModel)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("kind", LATER_REWARD_KINDS)
def test_later_kinds_are_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match=f"'{kind}' is known but not implemented yet"):
        build_reward(kind, "anywhere")


def test_unknown_kinds_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match="unknown reward 'pikscore', did you mean 'pickscore'"):
        build_reward("pikscore", "anywhere")


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        ("model.safetensors", "no file named model.safetensors|safetensors"),
        ("tokenizer.json", "tokenizer"),
        ("processor_config.json", "image processor"),
        ("config.json", "config.json|the model"),
    ],
)
def test_an_incomplete_directory_is_one_line_that_names_it(directory, tmp_path, remove, says):
    path = tmp_path / "clip"
    shutil.copytree(directory, path)
    (path / remove).unlink()
    with pytest.raises(ValueError, match=says) as caught:
        build_reward("pickscore", str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
