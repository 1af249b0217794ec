"""Cut the arguments of a call over the ranks of a group, and put the ranks' results together again. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flashdmd_ray.batch import Batch, concat_values, split_value

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def split_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], ranks: int) -> tuple[list[Arguments], list[int]]:
    """One (args, kwargs) for each rank, and the size of each rank's shard (all 1 when nothing is cut).

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
    sizes = {tuple(len(shard) for shard in column) for column in columns if _is_cut(column[0])}
    if not sizes:
        return [1] * ranks
    if len(sizes) > 1:
        raise ValueError(
            f"the batches of one call have different sizes: {', '.join(str(sum(s)) for s in sorted(sizes))}"
        )
    (found,) = sizes
    if min(found) == 0:
        raise ValueError(
            f"cannot split a batch of {sum(found)} over {ranks} ranks: use a larger batch or fewer workers"
        )
    return list(found)


def _is_cut(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, Batch) or (isinstance(value, Tensor) and value.ndim > 0)


def is_replicated(result: Any) -> bool:
    """A mapping of tensors is a full set of weights, equal on all ranks: only rank 0 needs to send it."""
    return isinstance(result, dict) and bool(result) and all(isinstance(value, Tensor) for value in result.values())


def join_results(results: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The group's result from its ranks' results.

    Batches and tensors are concatenated, tuples joined element by element, floats and mappings of floats (metrics)
    averaged with the shard sizes as weights; of weights rank 0's copy is taken; anything else must be equal on all
    ranks.
    """
    first = results[0]
    if len(results) == 1 or is_replicated(first):
        return first
    if isinstance(first, dict):
        return {name: join_results([result[name] for result in results], sizes) for name in first}
    if isinstance(first, float):
        return sum(value * size for value, size in zip(results, sizes, strict=True)) / sum(sizes)
    if isinstance(first, tuple) and not all(isinstance(item, str) for item in first):
        return tuple(join_results(column, sizes) for column in zip(*results, strict=True))
    return concat_values(results)
