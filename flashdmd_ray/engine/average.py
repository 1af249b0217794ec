"""The average of a trained network's weights over its updates, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from flashdmd_ray.engine.base import Engine, under


class WeightAverage:
    """Exponential moving average of an engine's float32 masters, cut over the ranks as they are.

    diffusers' EMAModel: the n-th update keeps min(decay, n / (n + 9)) of the average (the first nothing). Before any update
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

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """As `Engine.weights`: on rank 0 the full average and the buffers by name, on the CPU. Collective."""
        return dict(self._engine._named(self._vector)) | self._engine._saved_buffers()

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
