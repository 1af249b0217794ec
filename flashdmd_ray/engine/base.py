"""What every training engine does, whatever shards the optimizer: fp32 master weights, and AdamW moments for each objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import OptimizerConfig
from flashdmd_ray.engine.flat import FlatLayout

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(ABC):
    """Trains `module`: forward by calling the engine, then one `backward` and one `update`.

    An *objective* is what an update optimises ("distillation", "preference"). All objectives move the same fp32 master weights, and each
    has AdamW moments, an update counter and a warm-up of its own: the small preference gradients would vanish under the second moments
    that the distillation gradients leave behind.

    With several ranks every method but the forward call is collective: all ranks call it in the same order. Gradients are averaged over
    ranks, so a loss must be a mean over the rank's own samples; see `shard_weight` for shards of different sizes.
    """

    module: nn.Module
    """The trained network. Its parameters belong to the engine: read them, never assign to them."""

    def __init__(self, module: nn.Module, settings: OptimizerConfig, role: str) -> None:
        self.module, self.settings, self.role = module, settings, role
        self.layout = FlatLayout.of(module)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        for name, p in zip(self.layout.names, self._trained, strict=True):
            if p.dtype != torch.float32:
                raise ValueError(f"{role}: parameter {name!r} is {p.dtype}: load the network in float32 to train it")
        if world_size() > 1:  # ranks may have drawn different initial weights
            for tensor in (*self._trained, *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
        self._moments: dict[str, dict[str, Tensor]] = {}  # by objective: AdamW's own state of the flat masters
        self._updates: dict[str, int] = {}
        self._loss_is_finite: Tensor | None = None  # of the backward that waits for its update
        self._masters: Tensor  # flat fp32 weights, or this rank's slice of them
        self._optimizer: torch.optim.AdamW  # over [self._masters]

    # ---- what a kind of engine provides

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the network with gradients. Without gradients, call `module`."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Leave the gradients where `_gradient_norm` finds them."""

    @abstractmethod
    def _gradient_norm(self) -> Tensor:
        """Average the gradients over ranks; return their global 2-norm, a float32 scalar equal on every rank."""

    @abstractmethod
    def _discard_gradient(self) -> None:
        """Forget the gradients, as if `backward` had not been called."""

    @abstractmethod
    def _apply(self, norm: Tensor) -> None:
        """Scale the gradients to `clip`, one step of `_optimizer`, and the new weights into the module."""

    @abstractmethod
    def _publish_masters(self) -> None:
        """Copy the masters into the module's parameters, on all ranks."""

    @abstractmethod
    def _gather(self, partition: Tensor) -> Tensor:
        """The full vector, at least (layout.numel,), of a vector partitioned like the masters."""

    @abstractmethod
    def _partition(self, full: Tensor) -> Tensor:
        """The inverse of `_gather`: this rank's part of a full vector (layout.numel,)."""

    # ---- training

    def backward(self, loss: Tensor) -> None:
        """Back-propagate a scalar loss. Once per update: sum the losses of an update first (ZeRO would silently drop all but the last)."""
        assert loss.ndim == 0, f"{self.role}: backward needs a scalar loss, not shape {tuple(loss.shape)}"
        assert self._loss_is_finite is None, (
            f"{self.role}: two backward calls before one update; sum the losses and call backward once"
        )
        self._loss_is_finite = torch.isfinite(loss.detach())
        self._backward(loss)

    def update(self, objective: str = "distillation", lr: float | None = None, warmup: int | None = None) -> float:
        """One AdamW update with the moments of `objective`; `lr` and `warmup` default to the engine's settings.

        The learning rate of update n of an objective is lr * min(1, n / warmup). Returns the global gradient norm before clipping.
        Raises FloatingPointError, on every rank, when a loss or gradient is not finite; weights, moments and counters are then untouched.
        """
        assert self._loss_is_finite is not None, f"{self.role}: update without a backward before it"
        number = self._updates.get(objective, 0) + 1
        norm = self._gradient_norm()
        self._refuse_non_finite(norm, f"{objective} update {number}")
        warmup = self.settings.warmup if warmup is None else warmup
        factor = min(1.0, number / warmup) if warmup else 1.0
        self._optimizer.param_groups[0]["lr"] = (self.settings.lr if lr is None else lr) * factor
        moments = self._moments.setdefault(objective, {})  # AdamW fills an empty one in place
        self._optimizer.state[self._masters] = moments
        self._apply(norm)
        self._updates[objective] = number
        return norm.item()

    def _refuse_non_finite(self, norm: Tensor, update: str) -> None:
        assert self._loss_is_finite is not None
        loss_is_finite, self._loss_is_finite = self._loss_is_finite.float(), None
        if world_size() > 1:
            dist.all_reduce(loss_is_finite, op=dist.ReduceOp.MIN)
        if loss_is_finite and torch.isfinite(norm):
            return
        self._discard_gradient()
        what = "gradient" if loss_is_finite else "loss"
        raise FloatingPointError(
            f"{self.role}: the {what} of {update} is not finite; weights and moments are unchanged. "
            "Lower the learning rate, lengthen the warm-up or inspect this step's inputs"
        )

    def updates(self, objective: str = "distillation") -> int:
        """Number of updates made for an objective."""
        return self._updates.get(objective, 0)

    def shard_weight(self, count: int) -> float:
        """Factor for this rank's mean loss over `count` samples that makes the average over ranks the mean over all samples.

        sum_r w_r mean_r / R = sum of all losses / N  needs  w_r = R count_r / N. Exactly 1.0 when all ranks hold equally many. Collective.
        """
        if world_size() == 1:
            return 1.0
        total = torch.tensor(float(count), dtype=torch.float64, device=self._masters.device)
        dist.all_reduce(total)
        return world_size() * count / total.item()

    # ---- weights

    @torch.no_grad()
    def couple(self, source: Engine, decay: float) -> None:
        """EMA coupling on the fp32 masters: psi <- decay psi + (1 - decay) theta, theta the masters of `source`.

        Raises ValueError when `source` is of another kind or trains other parameters. Collective.
        """
        if type(source) is not type(self) or source.layout != self.layout:
            raise ValueError(
                f"{self.role} cannot be coupled to {source.role}: they must train the same parameters with the same engine kind"
            )
        self._masters.lerp_(source._masters, 1.0 - decay)
        self._publish_masters()

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The full fp32 masters and the persistent buffers by name, on the CPU: what `load_state_dict` takes. Collective."""
        return self.layout.to_named(self._gather(self._masters.detach())) | self._buffers()

    def _buffers(self) -> dict[str, Tensor]:
        persistent = self.module.state_dict(keep_vars=True)
        return {name: b.detach().to("cpu", copy=True) for name, b in self.module.named_buffers() if name in persistent}

    # ---- checkpoints

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Everything an exact resume needs, by parameter name, on the CPU; the same for any number of ranks and either kind of engine.

        Keys: weights/<parameter>, buffers/<buffer>, updates/<objective>, moments/<objective>/{exp_avg,exp_avg_sq}/<parameter>. Collective.
        """
        state = {f"weights/{name}": t for name, t in self.layout.to_named(self._gather(self._masters.detach())).items()}
        state |= {f"buffers/{name}": t for name, t in self._buffers().items()}
        for objective, number in self._updates.items():
            state[f"updates/{objective}"] = torch.tensor(number, dtype=torch.int64)
            for moment in MOMENTS:
                named = self.layout.to_named(self._gather(self._moments[objective][moment]))
                state |= {f"moments/{objective}/{moment}/{name}": t for name, t in named.items()}
        return state

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned, on any engine over the same network. Collective.

        Raises ValueError, before any change, when it does not fit.
        """
        masters = self._partition(self._from_named(state, "weights/"))
        buffers = {name: b for name, b in self.module.named_buffers() if name in self.module.state_dict(keep_vars=True)}
        saved_buffers = _under(state, "buffers/")
        if set(buffers) != set(saved_buffers):
            raise ValueError(
                f"{self.role}: saved buffers {sorted(saved_buffers)} do not fit the network's {sorted(buffers)}"
            )
        moments: dict[str, dict[str, Tensor]] = {}
        updates = {objective: int(number) for objective, number in _under(state, "updates/").items()}
        for objective, number in updates.items():
            step = torch.tensor(float(number), dtype=torch.float32, device=self._masters.device)
            vectors = {m: self._partition(self._from_named(state, f"moments/{objective}/{m}/")) for m in MOMENTS}
            moments[objective] = {"step": step} | vectors
        self._masters.copy_(masters)
        for name, buffer in buffers.items():
            buffer.copy_(saved_buffers[name])
        self._moments, self._updates = moments, updates
        self._publish_masters()

    def _from_named(self, state: Mapping[str, Tensor], prefix: str) -> Tensor:
        try:
            return self.layout.from_named(_under(state, prefix)).to(self._masters.device)
        except ValueError as error:
            raise ValueError(f"{self.role}: {prefix[:-1]}: {error}") from None


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def world_size() -> int:
    """Ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def norm_of_parts(parts: list[Tensor]) -> Tensor:
    """Sum of squares of `parts` in float64 (as DeepSpeed does, so that both engines clip alike), a scalar on their device."""
    return torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in parts]).square().sum()
