"""Tensors between processes: as numpy arrays, which Ray moves through shared memory without pickling their bytes.

What arrives is always a copy of its own. Ray's arrays are read-only views of shared memory: writing to a tensor over
them would be undefined, and sums over memory with another alignment can differ in the last bit from those of the local
runtime.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from torch import Tensor

from flashdmd_ray.batch import PublishedWeights

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
    packed = ray.get(published.tensors, timeout=timeout_s) if published.tensors else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array).view(dtype) for name, (array, dtype) in packed.items()}
    return replace(published, tensors=tensors)


def with_fetched_weights(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout_s: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace every published set of weights among the arguments by one that a role can read."""

    def fetch(value: Any) -> Any:
        return fetch_weights(value, timeout_s) if isinstance(value, PublishedWeights) else value

    return tuple(fetch(value) for value in args), {name: fetch(value) for name, value in kwargs.items()}
