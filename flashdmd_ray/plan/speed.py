"""Seconds of a call from its operations, kernels and bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from flashdmd_ray.config import Config
from flashdmd_ray.plan.hardware import GPUS_OF_A_MACHINE, LAUNCH_S, NETWORK, UTILISATION, Gpu

OPTIMIZER_BYTES = 40
"""That an update of AdamW reads and writes for each parameter of a rank: gradient, master and moments, weights and the average."""
HOST_MEMORY = 50e9
"""Bytes a second of host memory that an offloaded AdamW reaches on 16 threads, an assumption."""
STORE = 1.5e9
"""Bytes a second through the object store and into another process."""


@dataclass
class Call:
    """flops: by precision. carried: bytes of arguments and results. ranks: that are called at once and share the way to the driver.
    stored: bytes that a rank leaves in its machine's object store or reads there. updated: parameters that an optimizer changed."""

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: float = 0.0
    carried: float = 0.0
    stored: float = 0.0
    updated: float = 0.0
    ranks: int = 1

    def add(self, flops: float, launches: float, precision: str) -> None:
        self.flops[precision] += flops
        self.launches += launches


def seconds_of(call: Call, config: Config, group: str, gpu: Gpu | None) -> float:
    """Seconds of one rank; 0 when nothing is known of its device."""
    if gpu is None:
        return 0.0
    compute = sum(
        flops / (UTILISATION * (gpu.tf32 if precision == "float32" else gpu.matmul))
        for precision, flops in call.flops.items()
    )
    moved = (call.carried + call.stored) / gpu.host
    if config.runtime == "ray":
        moved += (call.ranks * call.carried + call.stored) / STORE
    return max(compute, call.launches * LAUNCH_S) + moved + _update(call.updated, config, group, gpu)


def _update(parameters: float, config: Config, group: str, gpu: Gpu) -> float:
    """Gradients over the ranks, and one pass of AdamW."""
    if not parameters:
        return 0.0
    ranks = config.placement.of(group).workers
    sharded = ranks if config.engine.kind == "deepspeed" else 1
    link = gpu.link if ranks <= GPUS_OF_A_MACHINE else min(gpu.link, GPUS_OF_A_MACHINE * NETWORK)  # NCCL uses all ports
    exchanged = 4 * parameters * 2 * (ranks - 1) / ranks / link
    if config.engine.offload_optimizer and group == "learner":
        return exchanged + OPTIMIZER_BYTES * parameters / sharded / HOST_MEMORY + 6 * parameters / gpu.host
    return exchanged + OPTIMIZER_BYTES * parameters / sharded / gpu.memory
