"""Exports of the demo world to serve: made in a second from the teacher's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.demo import weights_path
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.results.export import export_pipeline
from flashdmd_ray.results.lora_export import export_lora
from flashdmd_ray.results.model_card import CardFacts

TIMESTEPS = (999, 749, 499, 249)
FACTS = CardFacts(
    name="demo-4-step",
    base="digit-scenes teacher of flashdmd_ray",
    licence="apache-2.0",
    cost={},
    optimised_rewards=[],
)


def export_demo(out: Path, change: float = 1.0) -> Path:
    """The demo's teacher as a four-step student; `change` multiplies its weights, so that versions differ."""
    family = SDXL.from_pretrained(str(weights_path("teacher")))
    weights = {name: tensor * change for name, tensor in family.teacher.state_dict().items()}
    return export_pipeline(family, weights, TIMESTEPS, out, FACTS)


def export_demo_lora(out: Path, change: float) -> Path:
    """A LoRA on the demo's teacher that turns its images; as large as `change`."""
    family = SDXL.from_pretrained(str(weights_path("teacher")), parts=["denoiser"])
    lora = LoraConfig(networks=("generator",), rank=4)
    adapted = AdaptedDenoiser(family.teacher, lora, seed=1)
    weights = {
        name: change * torch.ones_like(t) if ".lora_B." in name else t for name, t in adapted.state_dict().items()
    }
    return export_lora(family, lora, weights, TIMESTEPS, out, FACTS, "lora")
