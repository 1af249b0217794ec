"""What a configuration would do, in words and numbers, without loading a model: `--dry-run`. Imports no torch and no Ray.

`models` finds out what the networks are, `specs` says what must be known of each, `costs` looks that up, `roles` adds up what each role
holds and does in a step, `fit` compares it with a GPU, `text` prints it. docs/planning.md explains the figures.
"""

from __future__ import annotations

from flashdmd_ray.plan.check import check, preview
from flashdmd_ray.plan.parts import Part, parts_of
from flashdmd_ray.plan.text import describe, table

__all__ = ["Part", "check", "describe", "parts_of", "preview", "table"]
