"""Messages between driver and roles: plain dataclasses of tensors and texts, and the only source of randomness.

Every dataclass here splits and concatenates along the batch, so that a worker group can hand each rank its shard. Noise is drawn per
sample from (seed, stream, global index): the numbers a sample sees do not depend on how many ranks share the batch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Metrics = dict[str, float]
"""Named figures of a role call or a step."""


class Batch:
    """Base of the dataclasses below: split and concatenate along dimension 0; ints are common to the whole batch."""

    def __len__(self) -> int:
        first = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return len(first)

    def split(self, parts: int) -> list[Self]:
        """Cut into `parts` shards of sizes that differ by at most one. Raises ValueError when a shard would be empty."""
        if len(self) < parts:
            raise ValueError(
                f"cannot split a batch of {len(self)} over {parts} ranks: use a larger batch or fewer ranks"
            )
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        lengths = {name: len(value) for name, value in values.items() if is_cut(value)}
        assert set(lengths.values()) == {len(self)}, (
            f"{type(self).__name__} holds columns of different sizes: {lengths}"
        )
        columns = {name: split_value(value, parts) for name, value in values.items()}
        return [type(self)(**{name: column[i] for name, column in columns.items()}) for i in range(parts)]

    @classmethod
    def concat(cls, shards: Sequence[Self]) -> Self:
        """The inverse of `split`."""
        return cls(**{f.name: concat_values([getattr(s, f.name) for s in shards]) for f in fields(cls)})  # type: ignore[arg-type]


def split_value(value: Any, parts: int) -> list[Any]:
    """One value per rank: batches, tensors (dim 0) and tuples of texts are cut, everything else is common to all ranks."""
    if not is_cut(value):
        return [value] * parts
    if isinstance(value, Batch):
        return list(value.split(parts))
    if isinstance(value, Tensor):
        return list(torch.tensor_split(value, parts))
    return [value[start:end] for start, end in _bounds(len(value), parts)]


def is_cut(value: Any) -> bool:
    """Return True for a value that is cut over ranks. An empty tuple is not: nothing says that it holds texts."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, Batch) or (isinstance(value, Tensor) and value.ndim > 0)


def concat_values(values: Sequence[Any]) -> Any:
    """The inverse of `split_value`; common values must be equal, and the mean is taken of single numbers in tensors."""
    first = values[0]
    if isinstance(first, Batch):
        return type(first).concat(values)
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.ndim else torch.stack(list(values)).mean()
    if isinstance(first, tuple) and all(isinstance(item, str) for item in first):
        return tuple(item for value in values for item in value)
    assert all(value == first for value in values), "ranks disagree about a value that is common to the batch"
    return first


def move(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor on `device`, in batches, mappings, lists and tuples too; everything else as it is."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor changed, in batches, mappings, lists and tuples too; everything else as it is."""
    return map_kind(value, Tensor, change)


def map_kind(value: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """`map_tensors` for values of another class."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Batch):
        columns = {f.name: map_kind(getattr(value, f.name), kind, change) for f in fields(value)}  # type: ignore[arg-type]
        return type(value)(**columns)
    if isinstance(value, Mapping):
        return {key: map_kind(item, kind, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_kind(item, kind, change) for item in value)
    return value


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    size, extra = divmod(length, parts)
    starts = [i * size + min(i, extra) for i in range(parts + 1)]
    return list(itertools.pairwise(starts))


@dataclass(frozen=True)
class Prompts(Batch):
    """Texts and their global positions in the batch. Embeddings never travel: each process encodes (and caches) its own.

    indices: int64 (B,).
    """

    texts: tuple[str, ...]
    indices: Tensor


@dataclass(frozen=True)
class NoiseLevels(Batch):
    """Noise levels of the generator's two forwards in one update.

    high_noise: int64 (B,), each sample's index into the denoising timesteps, where distribution matching acts.
    max_step: the highest index of the whole global batch, so that all ranks simulate equally far.
    low_noise: the timestep of the forward that the GAN judges; None when both losses act on the first forward (DMD2).
    """

    high_noise: Tensor
    max_step: int
    low_noise: int | None


@dataclass(frozen=True)
class StoredRows(Batch):
    """Rows of tensors that stay in the object store, where the workers that need them read them. Cut and joined like a tensor.

    parts: (reference to a list of tensors, index in it, first row, last row + 1), in order. columns: int64 (B,), which entry of
    dimension 1 is meant in each row; None for all of it.
    """

    parts: tuple[tuple[Any, int, int, int], ...]
    columns: Tensor | None = None

    def __len__(self) -> int:
        return sum(stop - start for _, _, start, stop in self.parts)

    def split(self, parts: int) -> list[Self]:
        return [self._rows(first, last) for first, last in _bounds(len(self), parts)]

    def _rows(self, first: int, last: int) -> Self:
        cut, before = [], 0
        for reference, index, start, stop in self.parts:
            begin, end = start + max(first - before, 0), min(stop, start + last - before)
            before += stop - start
            if begin < end:
                cut.append((reference, index, begin, end))
        return type(self)(tuple(cut), None if self.columns is None else self.columns[first:last])

    @classmethod
    def concat(cls, shards: Sequence[Self]) -> Self:
        columns = [shard.columns for shard in shards if shard.columns is not None]
        return cls(tuple(part for shard in shards for part in shard.parts), torch.cat(columns) if columns else None)


def choose(values: Any, columns: Tensor) -> Any:
    """Entry `columns[b]` (int64 (B,)) of dimension 1 in each row b of a tensor or StoredRows."""
    if isinstance(values, StoredRows):
        return StoredRows(values.parts, columns)
    return values[torch.arange(len(columns)), columns]


@dataclass(frozen=True)
class Latents(Batch):
    """Clean latents x0, float32 (B, C, h, w), already scaled by the autoencoder's scaling factor.

    In roles they are tensors. On Ray the driver holds large ones as StoredRows.
    """

    values: Tensor
    prompts: Prompts


@dataclass(frozen=True)
class Fakes(Batch):
    """Generated samples of one update: x at high noise for distribution matching, y at low noise for the pixel GAN.

    In the DMD2 baseline both losses act on one forward and the two are the same values.
    """

    high_noise: Latents
    low_noise: Latents


@dataclass(frozen=True)
class Candidates(Batch):
    """K candidates for each prompt: one noisy latent, denoised once and renoised K times.

    noisy: float32 (B, C, h, w) at `timestep`; values: float32 (B, K, C, h, w) at `next_timestep`; images: uint8 (B, K, 3, H, W), each
    candidate carried on to a clean latent and decoded, once for all that look at it, or (B, 0, 3, H, W) when nobody does.
    version: the published weights that made them. On Ray the driver holds large tensors as StoredRows.
    """

    prompts: Prompts
    noisy: Tensor
    values: Tensor
    images: Tensor
    timestep: int
    next_timestep: int
    version: int


@dataclass(frozen=True)
class PreferencePairs(Batch):
    """Winner and loser of each prompt group, float32 (B, C, h, w); weights float32 (B,) is 0 where the pair was not kept."""

    prompts: Prompts
    noisy: Tensor
    winners: Tensor
    losers: Tensor
    weights: Tensor
    margins: Tensor
    timestep: int
    next_timestep: int
    version: int


@dataclass(frozen=True)
class PublishedWeights:
    """Generator weights as rollout workers receive them. version: the step they follow. tensors: by name; none for rollouts that live
    beside the generator. key: different for every publication, since after a fault a version is published anew."""

    version: int
    tensors: Any
    key: str


def to_uint8(images: Tensor) -> Tensor:
    """Pixels uint8 of `images` float in [-1, 1], rounded to the nearest of 256 values; what lies outside is clamped."""
    return ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Images float32 in [-1, 1] of uint8 pixels."""
    return pixels.float() / 127.5 - 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts, equal on every machine and run. (torch's CPU generator uses the lower 32 bits of a seed.)"""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise(indices: Tensor, shape: Sequence[int], seed: int, stream: str) -> Tensor:
    """Standard normal noise, float32 (B, *shape), drawn sample by sample from (seed, stream, global index).

    It is drawn on the CPU, so that every device sees the same numbers, and lies on the device of `indices`.
    """
    rows = []
    for index in indices.tolist():
        generator = torch.Generator().manual_seed(derive_seed(seed, stream, index))
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows).to(indices.device)


@dataclass(frozen=True)
class StepRng:
    """Random choices of one step. Each has a named stream, so adding one never shifts another.

    The names enter the seeds: renaming a stream changes the numbers.
    """

    run_seed: int
    step: int

    def seed(self, stream: str) -> int:
        """Seed of the ranks' noise in this stream."""
        return derive_seed(self.run_seed, self.step, stream)

    def _generator(self, stream: str) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream))

    def index(self, stream: str, count: int) -> int:
        """One index from 0..count-1 for the whole global batch: all ranks must make the same number of forwards."""
        return int(torch.randint(count, (), generator=self._generator(stream)))

    def timesteps(self, stream: str, count: int, low: int, high: int) -> Tensor:
        """Uniform timesteps from low..high-1, int64 (count,)."""
        return torch.randint(low, high, (count,), generator=self._generator(stream))
