"""Training engines: the same interface over plain torch and over DeepSpeed ZeRO."""

from __future__ import annotations

from torch import nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine.base import Engine
from flashdmd_ray.engine.loading import Source, in_turn, skeleton
from flashdmd_ray.engine.processes import free_port, init_process_group, world_size
from flashdmd_ray.engine.torch_engine import TorchEngine

__all__ = ["Engine", "build_engine", "free_port", "in_turn", "init_process_group", "skeleton", "world_size"]


def build_engine(
    config: EngineConfig,
    module: nn.Module,
    optimizer: OptimizerConfig,
    role: str,
    source: Source | None = None,
) -> Engine:
    """Build the engine that trains `module` for a role: its float32 parameters with `requires_grad`, on the device where they are.

    role: named in errors. source: the weights by name when `module` is a `skeleton`; only rank 0 reads it, one tensor at a time.
    With several ranks, call `init_process_group` first. DeepSpeed without a process group gets one of a single rank.
    """
    if config.kind == "torch":
        return TorchEngine(module, optimizer, config, role, source)
    from flashdmd_ray.engine import deepspeed_engine as zero  # DeepSpeed takes seconds to import

    kind = zero.DeepSpeedStage3Engine if config.zero_stage == 3 else zero.DeepSpeedEngine
    return kind(module, optimizer, config, role, source)
