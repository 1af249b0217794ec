"""A proof that new weights took effect: the output for a fixed input changes with them."""

from __future__ import annotations

PATIENCE = 20
"""Versions in a row that may leave the output as it was where half precision rounds small changes away."""


class Proof:
    """Compares what a network holds and what it gives, version after version."""

    def __init__(self, name: str, exact: bool) -> None:
        """name: of the worker, for errors. exact: the network computes in float32, where every update shows."""
        self._name = name
        self._allowed = 0 if exact else PATIENCE
        self._last: tuple[str, str] | None = None
        self._unchanged = 0

    def check(self, version: int, weights: str, output: str) -> None:
        """weights, output: checksums after `version` was loaded. Raises ValueError when weights changed and the output did not."""
        before, self._last = self._last, (weights, output)
        if before is None or before[0] == weights:
            return
        self._unchanged = self._unchanged + 1 if before[1] == output else 0
        if self._unchanged > self._allowed:
            raise ValueError(
                f"{self._name}: weights of version {version} differ from those before, but the network's output for a fixed input does "
                "not: the worker samples with stale weights"
            )
