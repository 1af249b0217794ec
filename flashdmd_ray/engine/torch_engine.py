"""Plain torch: every rank holds all weights and moments; gradients are averaged with one all-reduce."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import OptimizerConfig
from flashdmd_ray.engine.base import Engine, norm_of_parts, world_size


class TorchEngine(Engine):
    """Parameters and gradients of the module are views of flat vectors: reduction, clipping, AdamW and coupling are one operation each."""

    def __init__(self, module: nn.Module, settings: OptimizerConfig, role: str) -> None:
        super().__init__(module, settings, role)
        weights = self.layout.join(self._trained)
        self._gradient = torch.zeros_like(weights)
        self._gradient_views = self.layout.views(self._gradient)
        for p, weight, gradient in zip(self._trained, self.layout.views(weights), self._gradient_views, strict=True):
            p.data, p.grad = weight, gradient
        self._masters = weights.requires_grad_()  # the same memory
        self._masters.grad = self._gradient
        self._optimizer = torch.optim.AdamW(
            [self._masters], lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
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
        self._optimizer.step()
        self._gradient.zero_()

    def _publish_masters(self) -> None:
        pass  # the parameters are views of the masters

    def _gather(self, partition: Tensor) -> Tensor:
        return partition

    def _partition(self, full: Tensor) -> Tensor:
        return full
