"""Rewards of kind pickscore and clipscore: their files, and the stock processor."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from flashdmd_ray.models.latent_reward import LatentRewardModel, UNetLatentReward, save_latent_reward
from flashdmd_ray.models.rewards import build_reward
from tests.models.rewards.small_rewards import TEXTS, bytes_as_images, noise_bytes, photos, write_clip
from tests.tiny import sdxl_pipeline


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def reward(directory):
    return build_reward("pickscore", str(directory))


@pytest.mark.parametrize("shape", [(24, 24), (40, 31), (31, 40), (12, 20), (7, 9)])
def test_preprocessing_is_that_of_the_stock_processor(reward, directory, shape):
    """On smooth images, up to the 8 bits that the stock processor rounds to after resizing."""
    pixels = photos(2, *shape)
    expected = CLIPImageProcessor.from_pretrained(directory)(list(pixels), return_tensors="pt").pixel_values
    ours = reward.preprocessing(bytes_as_images(pixels))
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1.1 / 255 / 0.26


def test_latent_reward_is_loaded_frozen(tmp_path):
    pipeline = sdxl_pipeline()
    save_latent_reward(UNetLatentReward.from_unet(pipeline.unet), tmp_path)
    model = build_reward("latent", str(tmp_path))
    assert isinstance(model, LatentRewardModel)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


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


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_single_file_takes_the_rest_from_its_base(reward, directory, tmp_path, suffix):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        shutil.copy(directory / "model.safetensors", file)
    else:
        torch.save(load_file(directory / "model.safetensors"), file)
    images = bytes_as_images(noise_bytes(len(TEXTS), 20, 20))
    alone = build_reward("pickscore", str(file), base=str(directory))
    assert torch.equal(alone.score(images, TEXTS), reward.score(images, TEXTS))


def test_what_is_no_weights_file_is_refused(directory, tmp_path):
    pickled = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), pickled)
    with pytest.raises(ValueError, match=r"module\.pth: it is no torch file, or a pickled object"):
        build_reward("pickscore", str(pickled), base=str(directory))
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"other\.bin lacks weight 'logit_scale' \(\d+ in all\)"):
        build_reward("pickscore", str(tmp_path / "other.bin"), base=str(directory))
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    with pytest.raises(ValueError, match=r"cannot load the model from .*broken\.safetensors"):
        build_reward("pickscore", str(tmp_path / "broken.safetensors"), base=str(directory))
