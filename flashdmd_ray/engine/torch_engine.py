"""Plain torch: every rank holds all weights and moments; gradients are averaged with one all-reduce."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import OptimizerConfig
from flashdmd_ray.engine.base import Engine, norm_of_parts, world_size


class TorchEngine(Engine):
    """Parameters and gradients of the module are views of flat vectors: reduction, clipping, AdamW and coupling are one operation each.

    float32: the module's parameters are the masters. bfloat16: the module computes in bfloat16, the masters are a float32 vector beside it.
    """

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig, role: str, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(module, settings, role)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        masters = self.layout.join(self._trained)
        module.to(dtype)
        if world_size() > 1:  # ranks may have drawn different initial weights
            for tensor in (masters, *module.buffers()):
                dist.broadcast(tensor, src=0)
        self._weights = masters if dtype == torch.float32 else masters.to(dtype)
        self._gradient = torch.zeros_like(self._weights)
        self._gradient_views = self.layout.views(self._gradient)
        for p, weight, gradient in zip(
            self._trained, self.layout.views(self._weights), self._gradient_views, strict=True
        ):
            p.data, p.grad = weight, gradient
        self._masters = masters.detach().requires_grad_()
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
        assert in_place, (
            f"{self.role}: a parameter's .grad was replaced (zero_grad or .to() on an engine's module); leave both to the engine"
        )
        self._masters.grad = self._gradient.float()  # the very vector in float32
        if world_size() > 1:
            dist.all_reduce(self._masters.grad)
            self._masters.grad.mul_(1.0 / world_size())
        return norm_of_parts(self.layout.views(self._masters.grad)).float().sqrt()

    def _discard_gradient(self) -> None:
        self._gradient.zero_()
        self._masters.grad = None

    @torch.no_grad()
    def _apply(self, norm: Tensor) -> None:
        assert self._masters.grad is not None
        if self.settings.clip > 0:
            self._masters.grad.mul_(1.0 / ((norm + 1e-6) / self.settings.clip).clamp(min=1.0))
        self._optimizer.step()
        self._publish_masters()
        self._discard_gradient()

    @torch.no_grad()
    def _publish_masters(self) -> None:
        if self._weights.dtype != torch.float32:
            self._weights.copy_(self._masters)

    def _gather(self, partition: Tensor) -> Tensor:
        return partition

    def _partition(self, full: Tensor) -> Tensor:
        return full.clone()
