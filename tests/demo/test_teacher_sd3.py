"""The recipe of the flow teacher: what it is trained on is what the stock pipeline and scheduler feed."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextModel

from flashdmd_ray.demo import weights_path
from flashdmd_ray.demo.checker import PromptChecker
from flashdmd_ray.demo.scenes import make_pool
from flashdmd_ray.diffusion.schedule import schedule_from_config
from recipes import teacher, teacher_sd3
from recipes.text import MAX_LENGTH, tokenize


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return teacher_sd3.load(weights_path("teacher_sd3"))


def test_plain_pipeline_draws_what_the_prompt_says(pipeline: StableDiffusion3Pipeline) -> None:
    captions = make_pool(32, "held_out", 3).captions
    images = teacher.sample(
        pipeline, captions, steps=25, guidance=teacher_sd3.GUIDANCE, seed=0, max_sequence_length=MAX_LENGTH
    )
    assert PromptChecker.load().correct(images, captions).float().mean() >= 0.75


def test_text_is_encoded_as_the_stock_pipeline_does(pipeline: StableDiffusion3Pipeline) -> None:
    captions = make_pool(3, "held_out", 5).captions
    states, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=captions, prompt_2=None, prompt_3=None, max_sequence_length=7
    )
    one, two, tokenizer = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer
    torch.testing.assert_close((states, pooled), teacher_sd3.encode_text(one, two, tokenize(tokenizer, captions), 7))
    empty = teacher_sd3.encode_text(one, two, tokenize(tokenizer, [""] * 3), 7)
    torch.testing.assert_close((negative, negative_pooled), empty)


def test_first_tower_is_the_other_teachers(pipeline: StableDiffusion3Pipeline) -> None:
    ids = tokenize(pipeline.tokenizer, make_pool(64, "train", 6).captions)
    original = CLIPTextModel.from_pretrained(weights_path("teacher") / "text_encoder")
    with torch.no_grad():
        ours = pipeline.text_encoder(input_ids=ids)
        pooled = original(input_ids=ids).pooler_output
    torch.testing.assert_close(ours.last_hidden_state, original(input_ids=ids).last_hidden_state)
    # a rotation and one scale: all angles between captions survive (half precision of the stored rotation)
    torch.testing.assert_close(
        torch.cosine_similarity(ours.text_embeds[:1], ours.text_embeds),
        torch.cosine_similarity(pooled[:1], pooled),
        atol=2e-3,
        rtol=0,
    )
    assert ours.text_embeds.square().mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("count", [1, 16, 40])
def test_one_counted_token_is_that_many_equal_ones(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    transformer = teacher_sd3.build_transformer(8, layers=2, heads=2, head_width=8)
    with torch.no_grad():
        for parameter in transformer.parameters():  # the zero gates would hide the attention
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    text = torch.randn(2, 5, teacher_sd3.JOINT_WIDTH, generator=generator)
    inputs = {
        "hidden_states": torch.randn(2, 3, 12, 12, generator=generator),
        "timestep": torch.tensor([100.0, 900.0]),
        "pooled_projections": torch.randn(2, 8, generator=generator),
    }
    repeated = torch.cat([text, text[:, -1:].expand(-1, count - 1, -1)], dim=1)
    with torch.no_grad():
        stock = transformer(encoder_hidden_states=repeated, **inputs).sample
        single = transformer(encoder_hidden_states=text, **inputs).sample
        transformer.set_attn_processor(teacher_sd3.LastTokenCounts())
        mask = teacher_sd3.last_token_mask(torch.full((2,), float(count)), 36 + 5)
        counted = transformer(
            encoder_hidden_states=text, joint_attention_kwargs={"attention_mask": mask}, **inputs
        ).sample
    torch.testing.assert_close(counted, stock, atol=1e-5, rtol=1e-4)
    assert count == 1 or not torch.allclose(single, stock, atol=1e-3), "the count must matter, or this shows nothing"


def test_our_schedule_reads_the_saved_scheduler_as_trained() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(weights_path("teacher_sd3") / "scheduler")
    schedule = schedule_from_config(scheduler.config)
    uniform = torch.tensor([1, 250, 500, 1000]) / 1000
    sigma = teacher_sd3.SHIFT * uniform / (1 + (teacher_sd3.SHIFT - 1) * uniform)
    t = torch.tensor([0, 249, 499, 999])
    torch.testing.assert_close(schedule.coefficients(t), (1 - sigma, sigma))
    torch.testing.assert_close(schedule.network_timestep(t), scheduler.timesteps.flip(0)[t])
