"""A configuration in words and numbers, without loading a model: `--dry-run`. Imports no Ray, and torch only when a step is run.

`models` finds out what the networks are, `specs` says what must be known of each and `costs` looks that up. `dry_step` runs the driver
with the real roles on networks that only have these prices, `parts` adds what a rank keeps, `fit` compares with a GPU, `forecast` says
how long it takes, `text` prints it. docs/planning.md explains the figures.
"""

from __future__ import annotations

from flashdmd_ray.plan.check import check, preview
from flashdmd_ray.plan.forecast import gpu_of
from flashdmd_ray.plan.gpus import use_gpus
from flashdmd_ray.plan.hardware import GPUS
from flashdmd_ray.plan.micro_batches import fit_micro_batches
from flashdmd_ray.plan.parts import Part, parts_of
from flashdmd_ray.plan.text import describe, sections, table

__all__ = [
    "GPUS",
    "Part",
    "check",
    "describe",
    "fit_micro_batches",
    "gpu_of",
    "parts_of",
    "preview",
    "sections",
    "table",
    "use_gpus",
]
