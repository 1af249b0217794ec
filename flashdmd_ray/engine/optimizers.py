"""AdamW over a flat vector of fp32 masters, with moments of 32 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flashdmd_ray.config import OptimizerConfig

Name = Literal["adamw", "adamw_8bit"]


def build_optimizer(name: Name, parameters: Sequence[Tensor], settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with the role's settings over `parameters`."""
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def padded(numel: int, name: Name) -> int:
    """Length of the flat vectors for `numel` elements."""
    return numel


def as_float32(moment: Tensor) -> Tensor:
    """A moment as plain float32, however it is kept."""
    return moment
