"""DeepSpeed ZeRO: stages 1 and 2 shard masters and moments (2 also gradients), stage 3 the weights too.

The only file that imports deepspeed.

DeepSpeed traps that are closed here, each pinned by a test against plain torch (docs/engines.md lists them): a second backward replaces the
first; `gradient_clipping` is 1.0 unless set; weights written into the module are undone by the next step; a step with a NaN is skipped
without a word; ranks are averaged whatever the sizes of their shards; bfloat16 masters start from rounded weights; stage 3 and offload
remember the last gradient of a parameter that took no part in an update.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import types
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine.base import Engine, norm_of_parts
from flashdmd_ray.engine.loading import Source, arrive, module_device, skeleton
from flashdmd_ray.engine.optimizers import build_optimizer
from flashdmd_ray.engine.processes import init_process_group, rank
from flashdmd_ray.engine.state import OptimizerState


@dataclass(eq=False, kw_only=True)
class ZeroState(OptimizerState):
    """Stages 1 and 2: rank r owns elements [r size, (r + 1) size) of the padded flat vector of all parameters."""

    is_sliced = True

    zero: Any
    """DeepSpeed's own optimizer."""

    def publish(self) -> None:
        self.zero.update_lp_params()

    def owned(self, vector: Tensor, index: int) -> tuple[int, Tensor]:
        size = vector.numel()
        start = self.layout.starts[index] - rank() * size
        stop = start + self.layout.shapes[index].numel()
        first, last = (min(max(edge, 0), size) for edge in (start, stop))
        return max(first - start, 0), vector[first:last]


class Stage3State(ZeroState):
    """Stage 3: a rank owns a slice of every parameter, one after the other in its vector."""

    @torch.no_grad()
    def publish(self) -> None:
        self.zero._partition_all_parameters()  # whatever a forward left gathered is old now
        self.zero._reassign_or_swap_out_partitioned_parameters(0)
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    @torch.no_grad()
    def live_weights(self) -> dict[str, Tensor]:
        computed = next(p.dtype for p in self.module.parameters() if p.requires_grad)
        return dict(self.gather(self.masters.detach(), computed)) | self._saved_buffers()

    def owned(self, vector: Tensor, index: int) -> tuple[int, Tensor]:
        first, size = self._starts[index], self._starts[index + 1] - self._starts[index]
        start = min(rank() * size, self.layout.shapes[index].numel())
        stop = min(start + size, self.layout.shapes[index].numel())
        return start, vector[first : first + stop - start]

    @cached_property
    def _starts(self) -> list[int]:
        """Start of each parameter's slice in a vector of this rank, and the end of the last one."""
        trained: list[Any] = [p for p in self.module.parameters() if p.requires_grad]
        return [0, *itertools.accumulate(p.partition_numel() for p in trained)]


class DeepSpeedEngine(Engine):
    """ZeRO stages 1 and 2 over the default process group: every rank holds all weights in the compute precision."""

    _kind_of_state: type[ZeroState] = ZeroState

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig, config: EngineConfig, role: str, source: Source | None
    ) -> None:
        if not dist.is_initialized():
            init_process_group(rank=0, world_size=1)
        self._deepspeed = import_deepspeed(module_device(module))
        self._settings = _deepspeed_settings(settings, config)
        # The float32 weights, to be held until the masters exist; a skeleton's are read from the source again.
        rounded = config.precision != "float32"
        exact = [p.detach() for p in module.parameters() if rounded and p.requires_grad and not p.is_meta]
        super().__init__(module, settings, config, role, source)
        adamw = build_optimizer("adamw", self._trained, settings)
        self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=adamw, config=self._settings)
        self._zero = self._engine.optimizer
        (masters,) = self._partitions()
        self.optimizer_state = self._kind_of_state(
            masters=masters,
            optimizer=self._zero.optimizer,  # `adamw`, which now updates this rank's slice of the masters
            module=module,
            layout=self.layout,
            role=role,
            zero=self._zero,
        )
        if rounded:  # DeepSpeed has made the masters from weights that it rounded before
            self._make_masters_exact(exact, source)
        if config.compile:
            module.compile()

    def _partitions(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    @torch.no_grad()
    def _make_masters_exact(self, exact: list[Tensor], source: Source | None) -> None:
        for index, (name, p) in enumerate(zip(self.layout.names, self._trained, strict=True)):
            if exact:
                full, exact[index] = exact[index], torch.empty(0)
            else:
                full = arrive(name, torch.empty(self.layout.shapes[index], device=p.device), source)
            self.optimizer_state.store(self.optimizer_state.masters, index, full)

    def _keep(self, parameter: nn.Parameter) -> None:
        """Every rank keeps all of it: DeepSpeed shards masters and moments by itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        offloaded = self.config.offload_optimizer
        parts: list[Any] = [self.optimizer_state.masters.grad] if offloaded else self._zero.averaged_gradients[0]
        squares = norm_of_parts(parts).to(self.device)
        dist.all_reduce(squares)
        return squares.float().sqrt()

    def _discard_gradient(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        self._zero.micro_step_id = -1
        if not self.config.offload_optimizer:
            self._zero.averaged_gradients[0] = self._zero.all_grad_tensors[0] = None
        self._forget_gradient()

    def _apply(self, norm: Tensor) -> None:
        self._engine.step()
        assert self._engine.was_step_applied(), (
            f"{self.role}: DeepSpeed skipped an update with a finite gradient of norm {norm.item()}"
        )
        self._forget_gradient()

    def _forget_gradient(self) -> None:
        """Clear what DeepSpeed would keep of this gradient for parameters that take no part in the next update."""
        if self.config.offload_optimizer:
            self._zero.reset_cpu_buffers()
            self.optimizer_state.masters.grad.zero_()  # type: ignore[union-attr]


class DeepSpeedStage3Engine(DeepSpeedEngine):
    """ZeRO stage 3: a rank holds its slice of every parameter; forwards and backwards gather each layer when they need it.

    Forwards without gradients through `module` gather too. Every rank makes the same forwards in the same order.
    """

    _kind_of_state = Stage3State

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig, config: EngineConfig, role: str, source: Source | None
    ) -> None:
        self._skeleton = skeleton(module)  # before DeepSpeed changes the module: what `copy` fills
        self._first: Any = None  # the first parameter that was sliced: it can slice the others
        self._arrivals = torch.empty(0)
        super().__init__(module, settings, config, role, source)
        self._arrivals = torch.empty(0)

    def _allocate(self, like: Tensor) -> Tensor:
        """One piece of memory for all parameters, of which only slices stay.

        With memory of its own for each, the allocator would leave holes as large as the parameters between the slices.
        """
        assert like.dtype == torch.float32, f"{self.role}: a skeleton is float32, not {like.dtype}"
        if not len(self._arrivals):
            self._arrivals = torch.empty(max(p.numel() for p in self.module.parameters()), device=self.device)
        return self._arrivals[: like.numel()].view(like.shape)

    def _keep(self, parameter: nn.Parameter) -> None:
        """Slice a parameter as soon as its weights have come."""
        if parameter.is_floating_point() and self.compute_dtype != torch.float32:
            parameter.data = parameter.data.to(self.compute_dtype)
        if self._first is None:
            self._first = parameter
            one = nn.ParameterList([parameter])
            self._deepspeed.zero.Init(module=one, config_dict_or_path=self._settings, dtype=parameter.dtype)
        else:
            self._first.convert_to_zero_parameters(param_list=[parameter])

    def _partitions(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat

    def _discard_gradient(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients = {}
        self._forget_gradient()

    def _forget_gradient(self) -> None:
        super()._forget_gradient()
        self._zero.grad_partitions_flat_buffer.zero_()

    @torch.no_grad()
    def copy(self) -> nn.Module:
        full = skeleton(self._skeleton)
        for sliced, p in zip(self.module.parameters(), full.parameters(), strict=True):
            with self._deepspeed.zero.GatheredParameters([sliced]):
                torch.utils.swap_tensors(p, nn.Parameter(sliced.detach().clone(), requires_grad=False))
        for mine, buffer in zip(self.module.buffers(), full.buffers(), strict=True):
            buffer.copy_(mine)
        return full.eval().requires_grad_(False)


def _deepspeed_settings(settings: OptimizerConfig, config: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage, "sub_group_size": 10**15}  # one vector of masters
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: DeepSpeed never sees our batches
        "gradient_accumulation_steps": 1,  # ours: see Engine.micro_batches
        "gradient_clipping": settings.clip,
        "zero_optimization": zero,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        options["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW runs on the CPU too, and nothing is compiled
    if config.precision == "bfloat16":
        options["bf16"] = {"enabled": True}
        options["communication_data_type"] = "fp32"
        if (
            config.zero_stage > 1
        ):  # with stage 1 this would choose another optimizer class, which keeps full fp32 gradients
            options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


def import_deepspeed(device: torch.device) -> Any:
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
