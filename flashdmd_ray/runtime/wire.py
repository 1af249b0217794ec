"""Tensors between processes: as numpy arrays, which Ray moves through shared memory without pickling their bytes.

What arrives is always a copy of its own. Ray's arrays are read-only views of shared memory: writing to a tensor over
them would be undefined, and sums over memory with another alignment can differ in the last bit from those of the local
runtime.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError
from torch import Tensor

from flashdmd_ray.batch import PublishedWeights, StoredRows, choose, map_kind, map_tensors
from flashdmd_ray.runtime.call_times import Reply
from flashdmd_ray.runtime.errors import TensorsLost
from flashdmd_ray.runtime.shards import SAMPLES, is_large

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUMPY_HAS = {
    torch.float16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
}


def register_tensors() -> None:
    """Let Ray carry `torch.Tensor` this way in this process; called by the driver and by every worker."""
    ray.util.register_serializer(Tensor, serializer=_to_array, deserializer=_to_tensor)


def _to_array(tensor: Tensor) -> tuple[np.ndarray, torch.dtype]:
    tensor = tensor.detach().cpu().contiguous()
    carried = tensor if tensor.dtype in _NUMPY_HAS else tensor.view(_CARRIERS[tensor.dtype.itemsize])
    return carried.numpy(), tensor.dtype


def _to_tensor(packed: tuple[np.ndarray, torch.dtype]) -> Tensor:
    array, dtype = packed
    return torch.tensor(array).view(dtype) if dtype not in _NUMPY_HAS else torch.tensor(array)


def published(weights: Mapping[str, Tensor], version: int) -> PublishedWeights:
    """Put one copy in the object store for any number of readers. It is kept as long as the returned object lives anywhere."""
    stored: ObjectRef = ray.put({name: _to_array(tensor) for name, tensor in weights.items()})
    return PublishedWeights(version, stored, stored.hex())


def fetch_weights(published: PublishedWeights, timeout_s: float) -> PublishedWeights:
    """Return the same weights with readable tensors: views of shared memory, to be copied from and never written to."""
    packed = _stored(published.tensors, timeout_s) if published.tensors else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array).view(dtype) for name, (array, dtype) in packed.items()}
    return replace(published, tensors=tensors)


def start_call(
    actor: Any, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool
) -> list[ObjectRef]:
    """Ask a worker for a call: references of its Reply and, for samples, of their tensors, which `together` joins to it.

    They belong to this process: tensors outlive the worker that made them.
    """
    if method not in SAMPLES:
        return [actor.call.remote(role, method, args, kwargs, traced)]
    return list(actor.make.options(num_returns=2).remote(role, method, args, kwargs, traced))


def apart(reply: Reply) -> tuple[Reply, list[np.ndarray]]:
    """A reply without its large tensors, and these, to be returned as a value of its own that stays in the object store."""
    kept: list[np.ndarray] = []

    def keep(tensor: Tensor) -> Tensor | StoredRows:
        if not is_large(tensor):
            return tensor
        kept.append(tensor.detach().contiguous().numpy())
        return StoredRows(((None, len(kept) - 1, 0, len(tensor)),))

    return replace(reply, result=map_tensors(reply.result, keep)), kept


def together(reply: Reply, store: Sequence[ObjectRef]) -> Reply:
    """A reply that knows where its tensors are. store: what `apart` left there; empty for another call."""
    if not store:
        return reply

    def find(rows: StoredRows) -> StoredRows:
        ((_, index, first, last),) = rows.parts
        return StoredRows(((store[0], index, first, last),))

    return replace(reply, result=map_kind(reply.result, StoredRows, find))


def fetch_rows(value: Any, timeout_s: float) -> Any:
    """Return `value` with tensors in place of StoredRows."""

    def fetch(rows: StoredRows) -> Tensor:
        stored = _stored([reference for reference, *_ in rows.parts], timeout_s)
        found = zip(stored, rows.parts, strict=True)
        whole = torch.cat([torch.tensor(arrays[index][first:last]) for arrays, (_, index, first, last) in found])
        return whole if rows.columns is None else choose(whole, rows.columns)

    return map_kind(value, StoredRows, fetch)


def _stored(references: Any, timeout_s: float) -> Any:
    """Values in the object store. Raises TensorsLost when the machine that had them is gone, or the process that put them there."""
    try:
        return ray.get(references, timeout=timeout_s)
    except GetTimeoutError:
        raise
    except RayError as error:
        raise TensorsLost(type(error).__name__) from None


def with_fetched(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout_s: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace what lies in the object store among the arguments by what a role can read."""

    def fetch(value: Any) -> Any:
        return fetch_weights(value, timeout_s) if isinstance(value, PublishedWeights) else fetch_rows(value, timeout_s)

    return tuple(fetch(value) for value in args), {name: fetch(value) for name, value in kwargs.items()}
