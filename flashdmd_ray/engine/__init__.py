"""Training engines: the same interface over plain torch and over DeepSpeed ZeRO."""

from __future__ import annotations

from torch import nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine.base import Engine
from flashdmd_ray.engine.processes import free_port, init_process_group
from flashdmd_ray.engine.torch_engine import TorchEngine

__all__ = ["Engine", "build_engine", "free_port", "init_process_group"]


def build_engine(
    config: EngineConfig,
    module: nn.Module,
    optimizer: OptimizerConfig,
    role: str,
) -> Engine:
    """The engine that trains `module` (already on its device; its parameters with `requires_grad`) for a role.

    role: named in errors.
    With several ranks, call `init_process_group` first. DeepSpeed without a process group gets one of a single rank.
    """
    if config.kind == "torch":
        return TorchEngine(module, optimizer, role)
    from flashdmd_ray.engine.deepspeed_engine import DeepSpeedEngine  # DeepSpeed takes seconds to import

    return DeepSpeedEngine(module, optimizer, role, config.zero_stage)
