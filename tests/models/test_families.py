"""Every model family against its stock pipeline: conditioning, guided sampling, few-step sampling, decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from flashdmd_ray.batch import Prompts
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.diffusion.sampling import ddim_sample, few_step_sample, guided
from flashdmd_ray.models import family_class
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.networks import prompt_noise, x0_predictor
from tests.tiny import LENGTH, save_sd3, save_sd15, save_sdxl

TEXTS = ["a red 4 on a gray background", "two 7s", "", "a very long prompt that is cut after a few letters"]
TIMESTEPS = (999, 749, 499, 249)


@dataclass(frozen=True)
class Case:
    """A family, loaded, with the stock pipeline of the same directory and how that is called."""

    path: str
    family: Family
    pipeline: Any
    flow: bool
    call: dict[str, Any]


CASES = {
    "sdxl epsilon": ("sdxl", save_sdxl, {"prediction_type": "epsilon"}, {}),
    "sdxl v": ("sdxl", save_sdxl, {"prediction_type": "v_prediction", "zeros": False}, {}),
    "sd15 epsilon": ("sd15", save_sd15, {"prediction_type": "epsilon"}, {}),
    "sd15 v": ("sd15", save_sd15, {"prediction_type": "v_prediction"}, {}),
    "sd3": ("sd3", save_sd3, {}, {"max_sequence_length": LENGTH}),
    "sd3 T5": ("sd3", save_sd3, {"t5": True}, {}),
    "sd3.5": ("sd3", save_sd3, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}, {"max_sequence_length": LENGTH}),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory) -> Case:
    name, save, settings, call = CASES[request.param]
    path = str(save(tmp_path_factory.mktemp(name), **settings))
    family = family_class(name).from_pretrained(path, t5=bool(settings.get("t5")))
    # What a directory lacks must be said: diffusers refuses to guess that the T5 is left out on purpose.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" and not settings.get("t5") else {}
    pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return Case(path, family, pipeline, name == "sd3", call | {"height": 16, "width": 16, "output_type": "latent"})


def stock_conditioning(case: Case) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """(prompt_embeds, pooled) of the stock pipeline, with and without the prompt."""
    pipeline = case.pipeline
    with torch.no_grad():
        if case.family.name == "sd15":
            positive, negative = pipeline.encode_prompt(TEXTS, "cpu", 1, True)
            return [positive, None], [negative, None]
        if case.family.name == "sdxl":
            positive, negative, pooled, negative_pooled = pipeline.encode_prompt(
                TEXTS, do_classifier_free_guidance=True
            )
        else:
            extra = {key: case.call[key] for key in ("max_sequence_length",) if key in case.call}
            positive, negative, pooled, negative_pooled = pipeline.encode_prompt(TEXTS, None, None, **extra)
    return [positive, pooled], [negative, negative_pooled]


def test_conditioning_is_that_of_the_stock_pipeline(case):
    ours = [case.family.encode(TEXTS), case.family.unconditional(len(TEXTS))]
    for conditioning, expected in zip(ours, stock_conditioning(case), strict=True):
        for mine, theirs in zip((conditioning.prompt_embeds, conditioning.pooled), expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs)


def test_guided_sampling_gives_the_latents_of_the_stock_pipeline(case):
    """DDIM, or Euler on a flow, at sigmas that the scheduler then shifts."""
    steps, settings = 4, {}
    if case.flow:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(case.family.scheduler_config)
        settings["sigmas"] = [1 - k / steps for k in range(steps)]
    else:
        scheduler = DDIMScheduler.from_config(
            case.family.scheduler_config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        settings["num_inference_steps"] = steps
    case.pipeline.scheduler = scheduler
    start = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = case.pipeline(TEXTS, guidance_scale=4.0, latents=start, **case.call, **settings).images
    family = case.family
    conditional, unconditional = (
        x0_predictor(family.teacher, family.schedule, conditioning)
        for conditioning in (family.encode(TEXTS), family.unconditional(len(TEXTS)))
    )
    with torch.no_grad():
        ours = ddim_sample(guided(conditional, unconditional, 4.0), family.schedule, steps, start)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def stock_few_step(case: Case, scheduler: Any, noise_sampler: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The stock pipeline's few steps, with `noise_sampler` where the scheduler draws its own."""
    hops = iter(range(1, len(TIMESTEPS) + 1))
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_arguments, **_settings: noise_sampler(next(hops)))
    case.pipeline.scheduler = scheduler
    schedule = {"sigmas": [(t + 1) / 1000 for t in TIMESTEPS]} if case.flow else {"timesteps": list(TIMESTEPS)}
    return case.pipeline(TEXTS, guidance_scale=0, latents=noise_sampler(0), **case.call, **schedule).images


def few_step_schedulers(case: Case) -> list[Any]:
    config = case.family.scheduler_config
    if not case.flow:
        return [LCMScheduler.from_config(config, original_inference_steps=1000, timestep_scaling=1e6)]
    shift = config["shift"]
    return [FlowMatchLCMScheduler(shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)]


def test_few_step_sampling_is_the_stock_schedulers(case, monkeypatch):
    """At 999, 749, 499, 249 and with the same noise: LCMScheduler, FlowMatchLCMScheduler, and Euler's stochastic sampling."""
    noise_sampler = prompt_noise(Prompts(tuple(TEXTS), torch.arange(4)), (4, 8, 8), 1, "test")
    predict_x0 = x0_predictor(case.family.teacher, case.family.schedule, case.family.encode(TEXTS))
    with torch.no_grad():
        ours = few_step_sample(predict_x0, case.family.schedule, TIMESTEPS, noise_sampler)
    for scheduler in few_step_schedulers(case):
        expected = stock_few_step(case, scheduler, noise_sampler, monkeypatch)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_decoding_and_encoding_are_the_stock_vaes(case):
    vae, config = case.pipeline.vae, case.pipeline.vae.config
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = vae.decode(latents / 0.5 + (config.shift_factor or 0)).sample
        torch.testing.assert_close(case.family.decode(latents), expected)
        images = expected.clamp(-1, 1)
        mean = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(case.family.encode_images(images), (mean - (config.shift_factor or 0)) * 0.5)


def test_mid_features_train_only_the_first_half(case):
    student = case.family.denoiser(gradient_checkpointing=True)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 249])
    conditioning = case.family.encode(TEXTS[:2])
    features = student.mid_features(noisy, case.family.schedule.network_timestep(t), conditioning)
    assert features.shape == (2, case.family.mid_width, 4, 4)
    features.sum().backward()
    moved = {name for name, parameter in student.network.named_parameters() if parameter.grad is not None}
    first, last = ("pos_embed.proj.weight", "proj_out.weight") if case.flow else ("conv_in.weight", "conv_out.weight")
    assert first in moved
    assert last not in moved


def test_mid_features_of_sd3_are_what_its_middle_block_puts_out(tmp_path):
    family = family_class("sd3").from_pretrained(str(save_sd3(tmp_path / "sd3")))
    seen: list[Any] = []
    teacher = family.teacher
    teacher.network.transformer_blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    noisy, t, conditioning = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 400.0]), family.encode(TEXTS[:2])
    with torch.no_grad():
        teacher(noisy, t, conditioning)
        features = teacher.mid_features(noisy, t, conditioning)
    # token (row, column) is position (row, column) of the map
    torch.testing.assert_close(features[:, :, 1, 2], seen[0][:, 1 * 4 + 2])


def test_gradient_checkpointing_changes_nothing(case):
    noisy, conditioning = torch.randn(2, 4, 8, 8), case.family.encode(TEXTS[:2])
    t = case.family.schedule.network_timestep(torch.tensor([999, 249]))
    gradients = []
    for checkpointing in (False, True):
        student = case.family.denoiser(gradient_checkpointing=checkpointing)
        student(noisy, t, conditioning).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_registry_and_the_classes_agree(name):
    family = family_class(name)
    assert family.name == name
    assert family.pipeline_class.__name__ == FAMILIES[name].pipeline
    assert issubclass(family, Family)
