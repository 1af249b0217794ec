"""Plain torch: every rank holds all weights and moments; gradients are averaged with one all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig
from flashdmd_ray.engine.base import Engine, norm_of_parts
from flashdmd_ray.engine.loading import Source
from flashdmd_ray.engine.optimizers import build_optimizer
from flashdmd_ray.engine.processes import world_size
from flashdmd_ray.engine.state import OptimizerState


class TorchEngine(Engine):
    """Engine over flat vectors: reduction, clipping, AdamW and averaging are one operation each.

    Parameters and gradients of the module are views of the vectors. In float32 the parameters are views of the masters. In bfloat16, or
    with offload_optimizer, they are views of a vector of their own, in the compute precision on the module's device; masters and moments
    are float32, beside it or in host memory. Gradients are float32 sums in every case; a bfloat16 backward hands over each parameter's
    gradient as soon as it is complete.
    """

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig, config: EngineConfig, role: str, source: Source | None
    ) -> None:
        super().__init__(module, settings, config, role, source)
        size = self.layout.numel
        masters = weights = torch.zeros(size, device="cpu" if config.offload_optimizer else self.device)
        if config.offload_optimizer or self.compute_dtype != torch.float32:
            weights = torch.zeros(size, device=self.device, dtype=self.compute_dtype)
        self._gradient = torch.zeros(size, device=self.device)
        self._gradient_views = self.layout.views(self._gradient)
        self._adopt(masters, weights)
        masters.requires_grad_()
        optimizer = build_optimizer(config.optimizer, [masters], settings)
        self.optimizer_state = WholeState(
            masters=masters, optimizer=optimizer, module=module, layout=self.layout, role=role, published=weights
        )
        if config.compile:
            module.compile()

    @torch.no_grad()
    def _adopt(self, masters: Tensor, weights: Tensor) -> None:
        """Make parameters and gradients views of the flat vectors, one by one: each frees what it held before."""
        places = zip(self._trained, self.layout.views(weights), self.layout.views(masters), strict=True)
        for index, (p, weight, master) in enumerate(places):
            master.copy_(p)
            weight.copy_(p)
            p.data = weight
            if self.compute_dtype == torch.float32:
                p.grad = self._gradient_views[index]
            else:
                p.register_post_accumulate_grad_hook(lambda p, view=self._gradient_views[index]: _hand_over(p, view))
        for p in self.module.parameters():
            if not p.requires_grad and p.is_floating_point() and self.compute_dtype != torch.float32:
                p.data = p.data.to(self.compute_dtype)

    def _keep(self, parameter: nn.Parameter) -> None:
        """Every rank keeps all of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        if self.compute_dtype == torch.float32:
            in_place = all(p.grad is view for p, view in zip(self._trained, self._gradient_views, strict=True))
            assert in_place, f"{self.role}: a parameter's .grad was replaced (zero_grad or .to() on an engine's module)"
        if world_size() > 1:
            dist.all_reduce(self._gradient)
            self._gradient.mul_(1.0 / world_size())
        return norm_of_parts(self._gradient_views).float().sqrt()

    def _discard_gradient(self) -> None:
        self._gradient.zero_()

    @torch.no_grad()
    def _apply(self, norm: Tensor) -> None:
        self._gradient.mul_(1.0 / ((norm + 1e-6) / self.settings.clip).clamp(min=1.0))
        state = self.optimizer_state
        state.masters.grad = self._gradient.to(state.masters.device)
        state.optimizer.step()
        state.masters.grad = None
        self._gradient.zero_()
        state.publish()


@dataclass(eq=False, kw_only=True)
class WholeState(OptimizerState):
    """Every rank holds all of it."""

    is_sliced = False

    published: Tensor
    """Vector that the parameters are views of; in float32 without offload the masters themselves."""

    def publish(self) -> None:
        if self.published.data_ptr() != self.masters.data_ptr():  # else they are the same memory
            self.published.copy_(self.masters)

    def owned(self, vector: Tensor, index: int) -> tuple[int, Tensor]:
        start = self.layout.starts[index]
        return 0, vector[start : start + self.layout.shapes[index].numel()]


def _hand_over(parameter: Tensor, gradient: Tensor) -> None:
    """Add the compute-precision gradient of a parameter to its float32 sum, and free it."""
    assert parameter.grad is not None
    gradient.add_(parameter.grad)
    parameter.grad = None
