"""Training engines: the same interface over plain torch and over DeepSpeed ZeRO."""

from __future__ import annotations

from torch import nn

from flashdmd_ray.config import EngineConfig
from flashdmd_ray.engine.base import Engine, OptimizerSettings
from flashdmd_ray.engine.processes import free_port, init_process_group
from flashdmd_ray.engine.torch_engine import TorchEngine

__all__ = ["Engine", "OptimizerSettings", "build_engine", "free_port", "init_process_group"]


def build_engine(
    config: EngineConfig,
    module: nn.Module,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float,
    warmup: int,
    role: str,
) -> Engine:
    """The engine that trains `module` (already on its device; its parameters with `requires_grad`) for a role.

    lr, betas, weight_decay: AdamW. clip: largest global gradient norm, 0 for none. warmup: updates of linear warm-up. role: for errors.
    With several ranks, call `init_process_group` first. DeepSpeed without a process group gets one of a single rank.
    """
    settings = OptimizerSettings(lr, betas, weight_decay, clip, warmup)
    if config.kind == "torch":
        return TorchEngine(module, settings, role)
    from flashdmd_ray.engine.deepspeed_engine import DeepSpeedEngine  # DeepSpeed takes seconds to import

    return DeepSpeedEngine(module, settings, role, config.zero_stage)
