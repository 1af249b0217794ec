"""Optimizer state by parameter name, whatever slices of it a rank holds, for checkpoints and averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.engine.flat import FlatLayout
from flashdmd_ray.engine.loading import module_device
from flashdmd_ray.engine.optimizers import MOMENTS, read_moment, restored_state
from flashdmd_ray.engine.processes import rank, world_size


@dataclass(eq=False, kw_only=True)
class OptimizerState(ABC):
    """fp32 master weights, and for each objective AdamW moments and an update counter: flat vectors, or this rank's slices of them.

    Every vector here is sliced like `masters`. All methods but `owned` are collective: every rank calls them in the same order.
    """

    is_sliced: ClassVar[bool]
    """True when several ranks share the vectors out among them."""

    masters: Tensor
    """float32, 1-D."""
    optimizer: torch.optim.Optimizer
    """Over [masters]."""
    module: nn.Module
    layout: FlatLayout
    """Of the module's trained parameters, whole."""
    role: str
    """Named in errors."""
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By objective: AdamW's own state of the masters."""
    updates: dict[str, int] = field(default_factory=dict)
    """By objective: number of updates made."""

    # ---- what a kind of engine provides

    @abstractmethod
    def publish(self) -> None:
        """Copy the masters into the module's parameters, on all ranks."""

    @abstractmethod
    def owned(self, vector: Tensor, index: int) -> tuple[int, Tensor]:
        """This rank's part of one parameter: where it starts in the flattened parameter, and a view of it (1-D, may be empty)."""

    # ---- between vectors and names

    def gather(self, vector: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full parameter as `dtype` on the CPU with memory of its own) on rank 0, nothing on the others."""
        for index, name in enumerate(self.layout.names):
            start, piece = self.owned(vector, index)
            shape = self.layout.shapes[index]
            if self.is_sliced and world_size() > 1:
                full = torch.zeros(shape.numel(), device=self.device)
                full[start : start + piece.numel()] = piece
                dist.reduce(full, dst=0)  # zeros but for one rank: gathers pieces of any size
                piece = full
            if rank() == 0:
                yield name, piece.view(shape).to(dtype).to("cpu", copy=dtype == piece.dtype)

    def scatter(self, vector: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Fill a vector from full parameters by prefixed name: the inverse of `gather`, reading one parameter at a time."""
        for index, name in enumerate(self.layout.names):
            self.store(vector, index, tensors[prefix + name])

    def store(self, vector: Tensor, index: int, full: Tensor) -> None:
        """Write this rank's part of one full parameter into a vector."""
        start, piece = self.owned(vector, index)
        piece.copy_(full.reshape(-1)[start : start + piece.numel()])

    @property
    def device(self) -> torch.device:
        """Device on which ranks exchange tensors, also when the masters lie in host memory."""
        return module_device(self.module)

    # ---- weights

    @torch.no_grad()
    def ema_update_from(self, source: OptimizerState, decay: float) -> None:
        """See `Engine.ema_update_from`."""
        alike = type(source) is type(self) and source.layout == self.layout
        if not alike or source.masters.shape != self.masters.shape:
            raise ValueError(
                f"{self.role} cannot average with {source.role}: they must train the same parameters with the same engine kind"
            )
        self.masters.lerp_(source.masters, 1.0 - decay)
        self.publish()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """See `Engine.weights`."""
        return dict(self.gather(self.masters.detach())) | self._saved_buffers()

    def live_weights(self) -> dict[str, Tensor]:
        """See `Engine.live_weights`."""
        if rank() > 0:
            return {}
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return {name: tensor.detach().cpu() for name, tensor in (trained | self._buffers()).items()}

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict(keep_vars=True)
        return {name: b for name, b in self.module.named_buffers() if name in persistent}

    def _saved_buffers(self) -> dict[str, Tensor]:
        if rank() > 0:
            return {}
        return {name: b.detach().to("cpu", copy=True) for name, b in self._buffers().items()}

    # ---- checkpoints

    @torch.no_grad()
    def items(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.state_items`."""
        for name, tensor in self.gather(self.masters.detach()):
            yield f"weights/{name}", tensor
        for name, tensor in self._saved_buffers().items():
            yield f"buffers/{name}", tensor
        for objective, number in self.updates.items():
            if rank() == 0:
                yield f"updates/{objective}", torch.tensor(number, dtype=torch.int64)
            for moment in MOMENTS:
                for name, tensor in self.gather(read_moment(self.moments[objective], moment)):
                    yield f"moments/{objective}/{moment}/{name}", tensor

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine.load_state`."""
        updates = {objective: int(number) for objective, number in under(state, "updates/").items()}
        for prefix in ["weights/", *(f"moments/{objective}/{m}/" for objective in updates for m in MOMENTS)]:
            try:
                self.layout.check(under(state, prefix))
            except ValueError as error:
                raise ValueError(f"{self.role}: {prefix[:-1]}: {error}") from None
        buffers, saved_buffers = self._buffers(), under(state, "buffers/")
        if set(buffers) != set(saved_buffers):
            raise ValueError(
                f"{self.role}: saved buffers {sorted(saved_buffers)} do not fit the network's {sorted(buffers)}"
            )
        self.scatter(self.masters.detach(), state, "weights/")
        for name, buffer in buffers.items():
            buffer.copy_(saved_buffers[name])
        self.updates = updates
        self.moments = {objective: self._load_moments(state, objective) for objective in updates}
        self.publish()

    def _load_moments(self, state: Mapping[str, Tensor], objective: str) -> dict[str, Any]:
        vectors = {m: torch.zeros_like(self.masters, requires_grad=False) for m in MOMENTS}
        for moment, vector in vectors.items():
            self.scatter(vector, state, f"moments/{objective}/{moment}/")
        return restored_state(self.optimizer, self.masters, self.updates[objective], vectors)


def under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
