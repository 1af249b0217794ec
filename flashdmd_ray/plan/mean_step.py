"""The mean step of a configuration, for modules that must not import torch before its figures are asked for."""

from __future__ import annotations

from flashdmd_ray.config import Config
from flashdmd_ray.plan import specs
from flashdmd_ray.plan.hardware import Gpu
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.works import Step

REPEATS = 3
"""Steps of each kind that are run: their noise levels differ."""


def step_of(config: Config, models: Models, gpu: Gpu | None = None, repeats: int = REPEATS) -> Step | None:
    """Run one step of the real driver and roles without networks; None when an architecture is unknown. Imports torch when it is known.

    gpu: whose times are predicted. repeats: steps of each kind that are run; one is enough for memory.
    """
    if specs.teacher(config, models) is None:
        return None
    from flashdmd_ray.plan.dry_step import dry_step

    return dry_step(config, models, gpu, repeats)
