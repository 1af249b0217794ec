"""AdamW over one flat vector of fp32 masters, with moments of 32 bits, or of 8 bits from bitsandbytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from flashdmd_ray.config import OptimizerConfig, RateConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 256
"""Elements that share a scale in bitsandbytes' blockwise optimizers."""


def build_optimizer(
    name: Literal["adamw", "adamw_8bit"], parameters: Sequence[Tensor], settings: OptimizerConfig
) -> torch.optim.Optimizer:
    """Build AdamW with the role's settings over `parameters`. Raises ValueError when adamw_8bit cannot be had."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if sum(p.numel() for p in parameters) >= 2**31:
        raise ValueError(
            "engine.optimizer: 'adamw_8bit' counts its elements in 31 bits and this network has more; train adapters (lora.networks), "
            "or use engine.kind 'deepspeed' with 'adamw'"
        )
    eight_bit: torch.optim.Optimizer = _bitsandbytes().optim.AdamW8bit(parameters, **options)
    return eight_bit


def read_moment(state: Mapping[str, Any], moment: str) -> Tensor:
    """Return one of MOMENTS in float32 from the state that an optimizer keeps of the masters."""
    if moment in state:
        return torch.as_tensor(state[moment])
    number = 1 + MOMENTS.index(moment)
    codes = state[f"state{number}"]
    if codes.dtype == torch.float32:  # bitsandbytes leaves vectors of fewer than 4096 elements alone
        return torch.as_tensor(codes)
    absmax, code = state[f"absmax{number}"], state[f"qmap{number}"]
    return torch.as_tensor(
        _bitsandbytes().functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=_BLOCK)
    )


def restored_state(
    optimizer: torch.optim.Optimizer, masters: Tensor, number: int, vectors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Rebuild the state that `optimizer` keeps of the masters after `number` updates, from float32 moments."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.tensor(float(number), dtype=torch.float32, device=masters.device), **vectors}
    eight_bit: Any = optimizer
    eight_bit.state[masters] = {}
    eight_bit.init_state(eight_bit.param_groups[0], masters, 0, 0)
    state: dict[str, Any] = eight_bit.state[masters]
    state["step"] = number
    for index, moment in enumerate(MOMENTS, start=1):
        if state[f"state{index}"].dtype == torch.float32:
            state[f"state{index}"].copy_(vectors[moment])
            continue
        code = state[f"qmap{index}"]
        codes, scale = _bitsandbytes().functional.quantize_blockwise(vectors[moment], code=code, blocksize=_BLOCK)
        state[f"state{index}"].copy_(codes)
        state[f"absmax{index}"].copy_(scale.absmax)
    return state


def _bitsandbytes() -> Any:
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"engine.optimizer: 'adamw_8bit' needs bitsandbytes ({error}); install it with pip install 'flashdmd-ray[low-memory]', "
            "or use 'adamw'"
        ) from None


def learning_rate(rate: RateConfig, update: int) -> float:
    """Learning rate of update n = 1, 2, ... of an objective: linear warm-up, then constant or a linear decay.

        r_n = lr n / warmup                                                           n <= warmup
        r_n = lr (1 - f + floor f),   f = min(1, (n - warmup) / (decay - warmup))     n >  warmup

    A function of n and settings alone, so a resumed run goes on where it was, and a run that is made longer does what it did before.
    """
    if update <= rate.warmup:
        return rate.lr * (update / rate.warmup)
    if rate.decay is None:
        return rate.lr
    fallen = min(1.0, (update - rate.warmup) / (rate.decay - rate.warmup))
    return rate.lr * (1.0 - fallen + rate.floor * fallen)
