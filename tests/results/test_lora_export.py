"""LoRA files under plain diffusers: the teacher with the file draws the student's images, in both formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.diffusion.sampling import few_step_sample
from flashdmd_ray.models.family import Family
from flashdmd_ray.results.lora_export import FILES, LoraFormat, export_lora
from flashdmd_ray.results.model_card import CardFacts
from flashdmd_ray.roles.image_sampling import SampleNoise, seed_of
from flashdmd_ray.roles.networks import load_family, trained_network, x0_predictor
from tests.tiny import save_sd3, save_sdxl

TEXTS = ["a red 4", "two 7s", "a blue 1"]
TIMESTEPS = (999, 749, 499, 249)
FACTS = CardFacts("tiny-lora", "someone/base", "openrail++", {"generator updates": 2}, [], examples=[("a red 4", 17)])
SAVED = {"sdxl": save_sdxl, "sd3": save_sd3}
STOCK = {
    "sdxl": (StableDiffusionXLPipeline, LCMScheduler),
    "sd3": (StableDiffusion3Pipeline, FlowMatchEulerDiscreteScheduler),
}


def settings(family: str, root: Path) -> Config:
    """alpha is not the rank: a reader that assumes so must find the factor in the matrices."""
    lora = {"networks": ["generator", "score"], "rank": 4, "alpha": 2.0}
    teacher = SAVED[family](root / "teacher")
    model = {"family": family, "teacher": str(teacher)}
    return parse_config({"model": model, "lora": lora, "preference": {"updates": 0}, "rewards": []})


def trained_weights(config: Config, family: Family) -> dict[str, torch.Tensor]:
    network, draw = trained_network(config, family, "generator"), torch.Generator().manual_seed(3)
    return {name: 0.5 * torch.randn(p.shape, generator=draw) for name, p in network.named_parameters()}


@torch.no_grad()
def our_latents(network: torch.nn.Module, family: Family) -> torch.Tensor:
    noise_sampler = SampleNoise(range(len(TEXTS)), family.latent_shape, 5, torch.device("cpu"))
    return few_step_sample(
        x0_predictor(network, family.schedule, family.encode(TEXTS)), family.schedule, TIMESTEPS, noise_sampler
    )


@pytest.mark.parametrize(("name", "form"), [("sdxl", "lora"), ("sdxl", "kohya"), ("sd3", "lora")])
def test_the_teacher_with_the_file_draws_our_samples(name: str, form: LoraFormat, tmp_path: Path) -> None:
    config = settings(name, tmp_path)
    family = load_family(config.model)
    weights = trained_weights(config, family)
    out = export_lora(family, config.lora, weights, TIMESTEPS, tmp_path / "out", FACTS, form)

    pipeline_class, scheduler_class = STOCK[name]
    pipeline = pipeline_class.from_pretrained(config.model.teacher, use_safetensors=True, **family.load_settings())
    pipeline.load_lora_weights(out, weight_name=FILES[form])
    pipeline.scheduler = scheduler_class.from_pretrained(out, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    sampler = json.loads((out / "flashdmd.json").read_text())
    theirs = []
    for index, text in enumerate(TEXTS):
        torch.manual_seed(seed_of(5, index))
        generator = torch.Generator().manual_seed(seed_of(5, index)) if sampler["seed"] == "generator" else None
        theirs.append(pipeline(text, generator=generator, output_type="latent", **sampler["call"]).images)

    student = trained_network(config, family, "generator")
    student.load_state_dict(weights)
    ours = our_latents(student, family)
    scale = ours.abs().max().item()
    torch.testing.assert_close(torch.cat(theirs), ours, rtol=0, atol=2e-5 * scale)
    assert (ours - our_latents(family.teacher, family)).abs().max() > 1e-2 * scale, "the adapter must do something"


def test_kohya_s_names_and_shapes(tmp_path: Path) -> None:
    config = settings("sdxl", tmp_path)
    family = load_family(config.model)
    out = export_lora(family, config.lora, trained_weights(config, family), TIMESTEPS, tmp_path / "out", FACTS, "kohya")
    tensors = load_file(out / FILES["kohya"])
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{layer}.lora_down.weight"].shape == (4, 16)
    assert tensors[f"{layer}.lora_up.weight"].shape == (16, 4)
    assert tensors[f"{layer}.alpha"] == 4
    assert {name.split(".", 1)[1] for name in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert all(name.startswith("lora_unet_") and name.count(".") <= 2 for name in tensors)


def test_the_card_says_how_to_load_it(tmp_path: Path) -> None:
    config = settings("sdxl", tmp_path)
    family = load_family(config.model)
    out = export_lora(family, config.lora, trained_weights(config, family), TIMESTEPS, tmp_path / "out", FACTS, "lora")
    card = ModelCard.load(out / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "adapter")
    example = card.text.split("```python")[1].split("```")[0]
    compile(example, "example", "exec")
    for needed in ('from_pretrained("someone/base"', "load_lora_weights(", "LCMScheduler.from_pretrained("):
        assert needed in example
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "flashdmd.json", FILES["lora"], "scheduler"]
    )


def test_kohya_is_for_u_nets(tmp_path: Path) -> None:
    config = settings("sd3", tmp_path)
    family = load_family(config.model)
    with pytest.raises(ValueError, match="kohya's names are those of U-Nets"):
        export_lora(family, config.lora, {}, TIMESTEPS, tmp_path / "out", FACTS, "kohya")
