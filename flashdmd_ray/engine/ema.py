"""Exponential moving average of a trained network's weights, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from flashdmd_ray.engine.base import Engine
from flashdmd_ray.engine.state import under

CHUNK = 2**24
"""Elements that change places at a time."""


class EMA:
    """Exponential moving average of an engine's float32 masters, sliced over the ranks as they are.

    diffusers' EMAModel: the n-th call of `update` keeps min(decay, n / (n + 9)) of the average (the first nothing). Before any update
    it is the weights themselves.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._state = engine.optimizer_state
        self._average = EMAModel([self._masters()], decay=decay, foreach=True)

    def _masters(self) -> Tensor:
        # EMAModel copies, instead of averaging, what does not require a gradient.
        return self._state.masters.detach().requires_grad_()

    @property
    def _vector(self) -> Tensor:
        (vector,) = self._average.shadow_params
        assert isinstance(vector, Tensor)
        return vector

    def update(self) -> None:
        """Take in the masters as they are after one more update."""
        self._average.step([self._masters()])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network compute with the average; afterwards it has its own weights again, bit for bit. Collective.

        Not while a graph of the network waits for its backward.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange average and masters, a chunk at a time: another copy of all weights may not fit."""
        chunks = zip(self._state.masters.detach().split(CHUNK), self._vector.split(CHUNK), strict=True)
        for master, mean in chunks:
            copied = master.clone()
            master.copy_(mean)
            mean.copy_(copied)
        self._state.publish()

    @torch.no_grad()
    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what an exact resume needs, on rank 0: weights/<parameter>, and `updates`, int64 (). Collective."""
        for name, tensor in self._state.gather(self._vector):
            yield f"weights/{name}", tensor
        yield "updates", torch.tensor(self._average.optimization_step, dtype=torch.int64)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_items` gave. Raises ValueError when it belongs to another network."""
        try:
            self._state.layout.check(under(state, "weights/"))
        except ValueError as error:
            raise ValueError(f"{self._state.role}: average: {error}") from None
        self._state.scatter(self._vector, state, "weights/")
        self._average.optimization_step = int(state["updates"])
