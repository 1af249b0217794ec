"""Reading weights into memory, or their names, types and shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdmd_ray.models.headers import Header, read_header

_device = ContextVar("weights are read to", default="cpu")
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors gives them."""


@contextmanager
def without_values() -> Iterator[None]:
    """Loaders inside make their modules on the meta device: all that they check is checked, and no weight is read."""
    token = _device.set("meta")
    try:
        yield
    finally:
        _device.reset(token)


def weights_device() -> torch.device:
    """Device of what loaders read: the CPU, or meta inside `without_values`."""
    return torch.device(_device.get())


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on `weights_device`. Raises ModelFileError for quantised weights and what stands in for a file."""
    header = read_header(file)
    return load_file(file) if weights_device().type == "cpu" else empty_tensors(header)


def empty_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a file without their values, on the meta device."""
    return {
        name: torch.empty(shape, dtype=_TYPES[header.types[name]], device="meta")
        for name, shape in header.shapes.items()
    }


def type_in_file(header: Header, names: list[str]) -> torch.dtype:
    """The type that most of the values of these weights have."""
    sizes: dict[str, int] = {}
    for name in names:
        sizes[header.types[name]] = sizes.get(header.types[name], 0) + header.sizes[name]
    return _TYPES[max(sizes, key=lambda kind: sizes[kind])] if sizes else torch.float32
