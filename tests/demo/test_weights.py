"""The shipped weights: complete, small, loadable by the ordinary classes, and good."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from flashdmd_ray import demo
from flashdmd_ray.config import ModelConfig
from flashdmd_ray.demo import weights_path
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.demo.scenes import make_pool
from flashdmd_ray.models.latent_reward import load_latent_reward
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.rewards.latent_clip import LatentClip
from flashdmd_ray.roles.networks import load_parts
from recipes import latent_clip, latent_reward, reward, sam, teacher
from recipes.parts import PARTS, RECORD, card


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(weights_path("teacher"))


def test_all_parts_ship_within_16_megabytes_and_are_safetensors() -> None:
    files = [file for file in weights_path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}
    assert all(file.stat().st_mode & stat.S_IROTH for file in files), "unreadable for other users once installed"


def test_card_says_what_the_records_say() -> None:
    record = json.loads((weights_path() / RECORD).read_text())
    assert list(record) == list(PARTS)
    text = (weights_path() / "CARD.md").read_text()
    shown = card(record, weights_path()).splitlines()[:-1]  # the last line states the size, card included
    assert text.splitlines()[: len(shown)] == shown


def test_unknown_or_missing_part_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown part 'vae'"):
        weights_path("vae")
    monkeypatch.setattr(demo, "WEIGHTS_ROOT", tmp_path)
    with pytest.raises(ValueError, match="prepare_demo"):
        weights_path("sam")


def test_plain_pipeline_draws_what_the_prompt_says(pipeline: StableDiffusionXLPipeline) -> None:
    captions = make_pool(32, "held_out", 3).captions
    images = teacher.sample(pipeline, captions, steps=25, guidance=teacher.GUIDANCE, seed=0)
    assert PromptChecker.load().correct(images, captions).float().mean() >= 0.8


def test_reward_loads_as_clip_in_single_precision_and_prefers_correct_pictures() -> None:
    path = weights_path("reward")
    model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
    assert model.dtype == torch.float32
    pool = make_pool(4, "held_out", 1)
    inputs = processor(
        text=pool.captions,
        images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pool.images],
        padding="max_length",
        return_tensors="pt",
    )
    ids = inputs.input_ids
    with torch.no_grad():
        by_processor = model(**inputs).logits_per_image.diag()
    torch.testing.assert_close(by_processor, reward.score(model, ids, pool.batch(torch.arange(4))))
    figures = reward.evaluate(model.eval(), processor.tokenizer, 400)
    assert figures["beats_contradicting"] >= 0.9
    assert figures["beats_badly_drawn"] >= 0.9


def test_reward_has_a_gradient_to_pixels() -> None:
    model = CLIPModel.from_pretrained(weights_path("reward"))
    processor = CLIPProcessor.from_pretrained(weights_path("reward"))
    pool = make_pool(2, "held_out", 1)
    images = pool.batch(torch.arange(2)).requires_grad_()
    reward.score(model, reward.tokenize(processor.tokenizer, pool.captions), images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_latent_reward_prefers_correct_scenes_at_low_and_middle_noise() -> None:
    model = load_latent_reward(weights_path("latent_reward")).eval()
    family = load_parts(ModelConfig(), ("vae", "text"))
    figures = latent_reward.evaluate(model, family, 150)
    assert figures["t249_beats_contradicting"] >= 0.8
    assert figures["t499_beats_contradicting"] >= 0.7
    assert figures["t249_beats_badly_drawn"] >= 0.8


def test_the_reward_on_latents_ranks_candidates() -> None:
    model = build_reward("latent_clip", "demo")
    assert isinstance(model, LatentClip)
    family = load_parts(ModelConfig(), ("denoiser", "vae", "text"))
    figures = latent_clip.evaluate(model, family, model.judge, 16, 0)
    assert figures["t749_correlation"] + figures["t499_correlation"] >= 0.7


def test_tiny_sam_finds_the_digit_under_a_point() -> None:
    assert sam.evaluate(sam.load(weights_path("sam")), 150) >= 0.7
