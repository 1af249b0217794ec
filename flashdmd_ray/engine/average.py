"""The average of a trained network's weights over its updates, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from flashdmd_ray.engine.base import Engine, under

PIECE = 2**24
"""Numbers that change places at a time."""


class WeightAverage:
    """Exponential moving average of an engine's float32 masters, cut over the ranks as they are.

    diffusers' EMAModel: the n-th call of `update` keeps min(decay, n / (n + 9)) of the average (the first nothing). Before any update
    it is the weights themselves.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine = engine
        self._average = EMAModel([self._masters()], decay=decay, foreach=True)

    def _masters(self) -> Tensor:
        # EMAModel copies, instead of averaging, what does not require a gradient.
        return self._engine._masters.detach().requires_grad_()

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
        """Meanwhile the network computes with the average; afterwards with its own weights again, bit for bit. Collective.

        Not while a graph of the network waits for its backward.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Average and masters change places, a piece at a time: another copy of all weights may not fit."""
        pieces = zip(self._engine._masters.detach().split(PIECE), self._vector.split(PIECE), strict=True)
        for master, mean in pieces:
            kept = master.clone()
            master.copy_(mean)
            mean.copy_(kept)
        self._engine._publish_masters()

    @torch.no_grad()
    def state_items(self) -> Iterator[tuple[str, Tensor]]:
        """What an exact resume needs, on rank 0: weights/<parameter>, and `updates`, int64 (). Collective."""
        for name, tensor in self._engine._named(self._vector):
            yield f"weights/{name}", tensor
        yield "updates", torch.tensor(self._average.optimization_step, dtype=torch.int64)

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_items` gave. Raises ValueError when it belongs to another network."""
        try:
            self._engine.layout.check(under(state, "weights/"))
        except ValueError as error:
            raise ValueError(f"{self._engine.role}: average: {error}") from None
        self._engine._load_vector(self._vector, state, "weights/")
        self._average.optimization_step = int(state["updates"])
