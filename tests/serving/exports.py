"""Exports of the demo world to serve: made in a second from the teacher's weights."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.demo import weights_path
from flashdmd_ray.export import CardFacts, export_pipeline
from flashdmd_ray.models.sdxl import SDXL

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
