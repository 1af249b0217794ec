"""Split the arguments of a call over the ranks of a group, and join the ranks' results. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flashdmd_ray.batch import concat_values, is_cut, split_value

SAMPLES = ("generate", "sample_fakes", "candidates")
"""Methods whose large tensors stay in the object store: the driver hands them on without a look."""
LARGE = 4096
"""Bytes of a row from which a tensor is large: smaller ones are faster within their message."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def is_large(tensor: Tensor) -> bool:
    """Return True for a tensor that may stay in the object store; alike on all ranks, whose shards differ in their rows."""
    return bool(tensor.numel()) and tensor.ndim > 0 and tensor[0].nbytes >= LARGE


def split_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], ranks: int) -> tuple[list[Arguments], list[int]]:
    """Return (args, kwargs) for each rank, and the size of each rank's shard (all 1 when nothing is cut).

    Batches, tensors (dimension 0) and tuples of texts are cut, everything else is the same for all ranks.
    Raises ValueError when a shard would be empty.
    """
    if ranks == 1:
        return [(args, dict(kwargs))], [1]
    columns = [split_value(value, ranks) for value in args]
    named = {name: split_value(value, ranks) for name, value in kwargs.items()}
    shards = [(tuple(c[rank] for c in columns), {name: c[rank] for name, c in named.items()}) for rank in range(ranks)]
    sizes = _shard_sizes([*columns, *named.values()], ranks)
    return shards, sizes


def _shard_sizes(columns: Sequence[Sequence[Any]], ranks: int) -> list[int]:
    sizes = {tuple(len(shard) for shard in column) for column in columns if is_cut(column[0])}
    if not sizes:
        return [1] * ranks
    if len(sizes) > 1:
        raise ValueError(
            f"the batches of one call have different sizes: {', '.join(str(sum(s)) for s in sorted(sizes))}"
        )
    (shard_sizes,) = sizes
    if min(shard_sizes) == 0:
        raise ValueError(
            f"cannot split a batch of {sum(shard_sizes)} over {ranks} ranks: use a larger batch or fewer workers"
        )
    return list(shard_sizes)


def join_results(results: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Join the ranks' results to the group's.

    Batches and tensors are concatenated, tuples joined element by element, floats and mappings of floats (metrics)
    averaged with the shard sizes as weights; of mappings that the other ranks left empty (weights) rank 0's is taken;
    anything else must be equal on all ranks.
    """
    first = results[0]
    if len(results) == 1 or (isinstance(first, dict) and not any(results[1:])):
        return first
    if isinstance(first, dict):
        return {name: join_results([result[name] for result in results], sizes) for name in first}
    if isinstance(first, float):
        return sum(value * size for value, size in zip(results, sizes, strict=True)) / sum(sizes)
    if isinstance(first, tuple) and not all(isinstance(item, str) for item in first):
        return tuple(join_results(column, sizes) for column in zip(*results, strict=True))
    return concat_values(results)
