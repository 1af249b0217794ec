"""Settings of what is generated and measured of a student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from flashdmd_ray.config.section import Count, PathOrName, PositiveInt, Section


class EvaluationConfig(Section):
    prompts: PathOrName | None = None
    """Prompts of sample grids and table: a .txt, .jsonl or .parquet file, from its first line on. null: held-out digit scenes for
    the demo source; for other data its own prompts in the order of a stream of its own, which are prompts of training."""
    samples: Count = 500
    """Samples per row of the final table, and real images they are compared with; from 2, or 0 for no table. Prompts are used again, with
    other noise, when there are fewer. A Frechet distance needs more of them than it has features: 64 in the demo, 1,024 of PickScore."""
    batch: PositiveInt = 8
    """Images drawn, decoded and judged at a time, on each learner rank and in the final report."""
    teacher_steps: PositiveInt = 25
    """DDIM steps of the teacher's row, two forwards each with guidance."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Classifier-free guidance of the teacher's row, on the scale of `matching.guidance_scale` (1 is none); null takes that value. A
    teacher's best pictures may need another one than its best lesson."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the generator's weights over the steps, which sample grids, the table and exports then use; rollouts
    do not. The n-th step keeps min(ema, n / (n + 9)) of it, so that a short run averages too. 0 is off."""
    student_steps: tuple[PositiveInt, ...] | None = None
    """Few-step rows of the table: each divides the number of denoising timesteps and uses every so many of them.
    null: 1, 2, 4 and 8 where they do."""

    @field_validator("samples")
    @classmethod
    def _none_or_enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a distance between distributions needs at least 2 samples; 0 leaves the table out")
        return value
