"""Base of the training engines: micro-batches, backward, updates for several objectives, averages and copies of the weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.config import EngineConfig, OptimizerConfig, RateConfig
from flashdmd_ray.engine.flat import FlatLayout
from flashdmd_ray.engine.loading import Source, module_device, receive
from flashdmd_ray.engine.optimizers import learning_rate
from flashdmd_ray.engine.processes import world_size
from flashdmd_ray.engine.state import OptimizerState

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Engine(ABC):
    """Trainer of one network: call it for a forward with gradients, then `backward`, then `update`.

    An *objective* is what an update optimises ("distillation", "preference"). All objectives move the same fp32 master weights, and each
    has AdamW moments, an update counter and a learning rate of its own: the small preference gradients would vanish under the second
    moments that the distillation gradients leave behind.

    With several ranks every method but the forward call is collective: all ranks call it in the same order. (ZeRO stage 3 gathers weights
    in forwards, so there these are collective too.) Gradients are averaged over ranks, so a loss must be a mean over the rank's own
    samples; see `shard_weight` for shards of different sizes.
    """

    module: nn.Module
    """The trained network. Its parameters belong to the engine: read them, never assign to them."""

    def __init__(
        self, module: nn.Module, settings: OptimizerConfig, config: EngineConfig, role: str, source: Source | None
    ) -> None:
        self.module, self.settings, self.config, self.role = module, settings, config, role
        self.layout = FlatLayout.of(module)
        self.compute_dtype = COMPUTE_DTYPES[config.precision]
        self._trained = [p for p in module.parameters() if p.requires_grad]
        for name, p in zip(self.layout.names, self._trained, strict=True):
            if p.dtype != torch.float32:
                raise ValueError(f"{role}: parameter {name!r} is {p.dtype}: load the network in float32 to train it")
        self.device = module_device(module)
        receive(module, source, self._allocate, self._keep)
        self._loss_is_finite: Tensor | None = None  # of the backwards that wait for their update
        self._announced: tuple[float, bool] | None = None  # share and "is the last" of the micro-batch in hand
        self._complete = True  # no micro-batch of the coming update is missing
        self.optimizer_state: OptimizerState  # set by each kind of engine, which makes the masters

    def _allocate(self, like: Tensor) -> Tensor:
        """Memory for a parameter that arrives, with its shape and dtype."""
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    # ---- what a kind of engine provides

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through the network with gradients. Without gradients, call `module`."""

    @abstractmethod
    def _keep(self, parameter: nn.Parameter) -> None:
        """Keep this rank's share of a parameter whose weights have just arrived."""

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients to those of this update; after the last, leave them where `_gradient_norm` finds them."""

    @abstractmethod
    def _gradient_norm(self) -> Tensor:
        """Average the gradients over ranks; return their global 2-norm, a float32 scalar equal on every rank."""

    @abstractmethod
    def _discard_gradient(self) -> None:
        """Forget the gradients, as if `backward` had not been called."""

    @abstractmethod
    def _apply(self, norm: Tensor) -> None:
        """Scale the gradients to `clip`, make one step of the optimizer and copy the new weights into the module."""

    # ---- training

    def cut(self, count: int) -> list[slice]:
        """Rows of each of `engine.accumulation` micro-batches of `count` samples. Sizes differ by at most one."""
        number = self.config.micro_batches
        assert count >= number, f"{self.role}: {count} samples cannot be cut into {number} micro-batches"
        return [slice(count * k // number, count * (k + 1) // number) for k in range(number)]

    def micro_batches(self, count: int) -> Iterator[slice]:
        """Iterate over the micro-batches of one update.

        Inside each: one forward and one `backward` of the mean loss over its rows. Then one `update`, which equals that of the whole batch
        up to rounding. All ranks must make equally many.
        """
        assert self._loss_is_finite is None, f"{self.role}: a backward before micro_batches waits for its update"
        for rows in self.cut(count):
            self._announced = ((rows.stop - rows.start) / count, rows.stop == count)
            yield rows
            assert self._announced is None, f"{self.role}: a micro-batch without a backward"

    def backward(self, loss: Tensor) -> Tensor:
        """Back-propagate a scalar loss; returns its share of the update's loss, detached.

        Once per update, or once in each of `micro_batches`: otherwise sum the losses first (ZeRO would silently drop all but the last).
        """
        assert loss.ndim == 0, f"{self.role}: backward needs a scalar loss, not shape {tuple(loss.shape)}"
        if self._announced is None:
            assert self._loss_is_finite is None, (
                f"{self.role}: two backward calls before one update; sum the losses and call backward once, or use micro_batches"
            )
            share, last = 1.0, True
        else:
            (share, last), self._announced = self._announced, None
        if share != 1.0:
            loss = share * loss
        finite = torch.isfinite(loss.detach())
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        self._complete = last
        self._backward(loss, last)
        return loss.detach()

    def update(self, objective: str = "distillation", rate: RateConfig | None = None) -> float:
        """Make one AdamW update with the moments of `objective`.

        rate: the objective's `learning_rate` settings; None: the engine's. Returns the global gradient norm before clipping.
        Raises FloatingPointError, on every rank, when a loss or gradient is not finite; weights, moments and counters are then untouched.
        """
        assert self._loss_is_finite is not None, f"{self.role}: update without a backward before it"
        assert self._complete, f"{self.role}: update before the last of micro_batches"
        state = self.optimizer_state
        number = self.updates(objective) + 1
        norm = self._gradient_norm()
        self._refuse_non_finite(norm, f"{objective} update {number}")
        state.optimizer.param_groups[0]["lr"] = learning_rate(rate or self.settings, number)
        state.optimizer.state[state.masters] = state.moments.setdefault(
            objective, {}
        )  # AdamW fills an empty one in place
        self._apply(norm)
        state.updates[objective] = number
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

    @property
    def rate(self) -> float:
        """Learning rate of the last update."""
        return float(self.optimizer_state.optimizer.param_groups[0]["lr"])

    def updates(self, objective: str = "distillation") -> int:
        """Return the number of updates made for an objective."""
        return self.optimizer_state.updates.get(objective, 0)

    def shard_weight(self, count: int) -> float:
        """Weight of this rank's mean loss over `count` samples, so that the average over ranks is the mean over all samples.

        sum_r w_r mean_r / R = sum of all losses / N  needs  w_r = R count_r / N. Exactly 1.0 when all ranks hold equally many. Collective.
        """
        if world_size() == 1:
            return 1.0
        total = torch.tensor(float(count), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return world_size() * count / total.item()

    # ---- weights and checkpoints

    def ema_update_from(self, source: Engine, decay: float) -> None:
        """Move the weights towards another engine's: psi <- decay psi + (1 - decay) theta, on the fp32 masters.

        theta: the masters of `source`. A lerp of equal slices, whatever the ZeRO stage. Raises ValueError when `source` is of another
        kind or trains other parameters. Collective.
        """
        self.optimizer_state.ema_update_from(source.optimizer_state, decay)

    def weights(self) -> dict[str, Tensor]:
        """Full masters, float32, and persistent buffers by name, on the CPU of rank 0, in the form that `load_state_dict` takes.

        Gathered one parameter at a time; empty on the other ranks, which never hold more than one full parameter. Collective.
        """
        return self.optimizer_state.weights()

    def live_weights(self) -> dict[str, Tensor]:
        """Like `weights`, in the precision that the network computes in, and not copied where a network on the CPU holds them whole.

        Read them before the next update, which changes them. Collective.
        """
        return self.optimizer_state.live_weights()

    def copy(self) -> nn.Module:
        """Copy the network as it is now: frozen, complete on every rank, in evaluation mode and the compute precision. Collective."""
        return copy.deepcopy(self.module).eval().requires_grad_(False)

    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the entries of `state` one by one, so that a writer need not hold them all. Collective: every rank must exhaust it."""
        return self.optimizer_state.items()

    def state(self) -> dict[str, Tensor]:
        """Return everything an exact resume needs, by name, on the CPU of rank 0; the other ranks get an empty mapping.

        The same for any number of ranks, either kind of engine and every ZeRO stage. Keys: weights/<parameter>, buffers/<buffer>,
        updates/<objective>, moments/<objective>/{exp_avg,exp_avg_sq}/<parameter>. Collective.
        """
        return dict(self.state_items())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned on rank 0, on any engine over the same network.

        Every rank passes all of it; tensors are read one at a time, so a mapping over memory-mapped files (`checkpoint.load_tensors`)
        costs no rank a copy.

        Raises ValueError, before any change, when it does not fit. Gradients of an update that was not made are forgotten.
        """
        self.optimizer_state.load(state)
        if self._loss_is_finite is not None:
            self._discard_gradient()
        self._loss_is_finite = self._announced = None


def norm_of_parts(parts: list[Tensor]) -> Tensor:
    """Sum of squares of `parts` in float64 (as DeepSpeed does, so that both engines clip alike), a scalar on their device."""
    return torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in parts]).square().sum()
