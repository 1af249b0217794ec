"""DeepSpeed ZeRO stage 1: every rank holds all weights, and the masters and moments of its own slice. The only file that imports deepspeed.

DeepSpeed traps that are closed here, each pinned by a test against plain torch: a second backward replaces the first (`Engine.backward`
refuses it); `gradient_clipping` is 1.0 unless set; weights written into the module are undone by the next step (everything here writes
the masters); a step with a NaN is skipped without a word; ranks are averaged whatever the sizes of their shards (`Engine.shard_weight`).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import OptimizerConfig
from flashdmd_ray.engine.base import Engine, norm_of_parts, world_size
from flashdmd_ray.engine.processes import init_process_group


class DeepSpeedEngine(Engine):
    """ZeRO over the default process group. All ranks must be given the same initial weights or accept those of rank 0."""

    def __init__(self, module: nn.Module, settings: OptimizerConfig, role: str, zero_stage: int) -> None:
        if zero_stage != 1:
            raise ValueError(f"{role}: engine.zero_stage {zero_stage} is not available yet: use 1")
        if not dist.is_initialized():
            init_process_group(rank=0, world_size=1)
        super().__init__(module, settings, role)
        deepspeed = _import_deepspeed(self._trained[0].device)
        adamw = torch.optim.AdamW(
            self._trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=_config(settings, zero_stage))
        self._zero = self._engine.optimizer
        self._optimizer = self._zero.optimizer  # `adamw`, which now updates this rank's slice of the masters
        (self._masters,) = self._zero.single_partition_of_fp32_groups

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        squares = norm_of_parts(self._zero.averaged_gradients[0])
        dist.all_reduce(squares)
        return squares.float().sqrt()

    def _discard_gradient(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients[0] = self._zero.all_grad_tensors[0] = None

    def _apply(self, norm: Tensor) -> None:
        self._engine.step()
        assert self._engine.was_step_applied(), (
            f"{self.role}: DeepSpeed skipped an update with a finite gradient of norm {norm.item()}"
        )

    def _publish_masters(self) -> None:
        self._zero.update_lp_params()

    def _gather(self, partition: Tensor) -> Tensor:
        full = partition.new_empty(partition.numel() * world_size())
        dist.all_gather_into_tensor(full, partition.contiguous())
        return full

    def _partition(self, full: Tensor) -> Tensor:
        size = self._masters.numel()
        padded = torch.nn.functional.pad(full, (0, size * world_size() - full.numel()))
        return padded[dist.get_rank() * size :][:size].clone()


def _config(settings: OptimizerConfig, zero_stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: DeepSpeed never sees our batches
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": zero_stage},
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import on first use, without its log lines and, on the CPU, without compiling its shared-memory all-reduce (26-95 s, needs g++)."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed insists on a launcher's variable
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    autotuner = types.ModuleType("deepspeed.autotuning.autotuner")  # unused, and importing it imports all of MLflow
    autotuner.Autotuner = None  # type: ignore[attr-defined]
    sys.modules.setdefault(autotuner.__name__, autotuner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        backend = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined] # gloo does the all-reduce
    return deepspeed
