"""Which sample comes when: one permutation per epoch, as a pure function of seed, stream and position.

Nothing is drawn and nothing is kept, so a position in the data is a number, any process can compute any part of the
order, and going on after a stop needs no state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

ROUNDS = 4


class Order:
    """The order of `sum(sizes)` samples that lie in blocks, for example archives or row groups of a table.

    Each epoch of each stream has a permutation of its own. shuffle_blocks None: of everything. shuffle_blocks n: blocks come in a random
    order and n of them at a time are shuffled together, so that reading stays within n blocks.
    """

    def __init__(self, sizes: Sequence[int], seed: int, shuffle_blocks: int | None = None) -> None:
        assert min(sizes, default=0) >= 0
        assert shuffle_blocks is None or shuffle_blocks >= 1
        self.seed = seed
        self.shuffle_blocks = shuffle_blocks
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._starts = _starts(self._sizes)
        self._count = int(self._sizes.sum())
        assert self._count, "an order of nothing"

    def __len__(self) -> int:
        return self._count

    def samples(self, stream: str, positions: Integers) -> Integers:
        """The sample at each position 0, 1, 2, ... of a stream, int64 (B,); epoch e holds positions e*len .. (e+1)*len-1."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self._count)
        found = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            found[rows] = self._epoch(within[rows], f"{self.seed}/{stream}/{epoch}")
        return found

    def _epoch(self, within: Integers, key: str) -> Integers:
        if self.shuffle_blocks is None or self.shuffle_blocks >= len(self._sizes):
            return permute(within, self._count, key)
        blocks = permute(np.arange(len(self._sizes)), len(self._sizes), f"{key}/blocks")
        starts = _starts(self._sizes[blocks])
        edges = np.append(
            starts[:: self.shuffle_blocks], self._count
        )  # where each group of `shuffle_blocks` blocks begins
        groups = np.searchsorted(edges, within, side="right") - 1
        shuffled = np.empty_like(within)
        for group in np.unique(groups).tolist():
            rows, begin = groups == group, int(edges[group])
            shuffled[rows] = begin + permute(within[rows] - begin, int(edges[group + 1]) - begin, f"{key}/{group}")
        slots = np.searchsorted(starts, shuffled, side="right") - 1
        return self._starts[blocks[slots]] + shuffled - starts[slots]


def permute(values: Integers, count: int, key: str) -> Integers:
    """A permutation of 0..count-1 chosen by `key`, applied to `values`.

    A Feistel network on pairs (x, y) of about sqrt(count) values each: every round adds a keyed hash of one to the
    other. There are at most sqrt(count) pairs too many; a value that lands there goes round again. Constant memory for
    any count, and the same on every machine and library version.
    """
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = np.frombuffer(hashlib.shake_256(key.encode()).digest(16 * ROUNDS), dtype="<u8").reshape(ROUNDS, 2)
    keys, rows_, columns_ = keys.astype(np.uint64), np.uint64(rows), np.uint64(columns)
    result = values.astype(np.uint64)
    waiting: NDArray[Any] = np.arange(len(result))
    while len(waiting):
        x, y = np.divmod(result[waiting], columns_)
        for first, second in keys:
            x = (x + _mix(y ^ first) % rows_) % rows_
            y = (y + _mix(x ^ second) % columns_) % columns_
        result[waiting] = x * columns_ + y
        waiting = waiting[result[waiting] >= np.uint64(count)]
    return result.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64; products wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _starts(sizes: Integers) -> Integers:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)[:-1]])
