"""Labels of rows of images. Imports no network."""

from __future__ import annotations

from collections.abc import Sequence


def teacher_label(steps: int, guidance_scale: float) -> str:
    """Label of a row of teacher images."""
    return f"teacher, {steps} steps, guidance {guidance_scale:g}"


def student_label(name: str, timesteps: Sequence[int]) -> str:
    """Label of a row of a few-step generator's images."""
    return f"{name}, {len(timesteps)} {'step' if len(timesteps) == 1 else 'steps'}"
