"""Weights by name: read from a file without executing anything, put into a stock module whose names and shapes they must have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flashdmd_ray.models.headers import ModelFileError, refuse_stand_in, wrapper_of
from flashdmd_ray.models.locations import fetch_file
from flashdmd_ray.models.stock_modules import load_part
from flashdmd_ray.models.weight_reading import read_safetensors, weights_device

Built = TypeVar("Built", bound=nn.Module)


def find_file(path: str, names: Sequence[str]) -> Path:
    """The file that `path` names, or the first of `names` in that directory or hub repository.

    Raises ValueError, one line naming the path and the remedy, when there is none.
    """
    found: Path = load_part(path, "", lambda: fetch_file(path, names))
    return found


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch file, on the CPU. Raises ValueError as `read_file` does, and without names."""
    state = read_file(file)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} does not hold tensors by name; choose another file")
    start = wrapper_of(state)
    return {name.removeprefix(start): tensor for name, tensor in state.items()}


def read_file(file: Path) -> Any:
    """Read the tensors of a safetensors file or a torch file; nothing in it is executed.

    Raises ValueError when it is damaged, or holds pickled objects instead of tensors.
    """

    def read() -> Any:
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        refuse_stand_in(file)
        try:
            return torch.load(file, map_location=weights_device(), weights_only=True)
        except UnpicklingError as error:
            raise ModelFileError(
                "it is no torch file, or a pickled object, which could execute anything: convert that to safetensors first"
            ) from error

    return load_part(str(file), "", read)


def assemble(build: Callable[[], Built], state: Mapping[str, Tensor], what: str, dtype: torch.dtype) -> Built:
    """The module that `build` makes with exactly the weights of `state`, frozen and in evaluation mode.

    Its random initial values are never computed nor allocated. Raises ValueError, naming `what`, unless names and shapes are the module's.
    """
    with torch.device("meta"):
        module = build()
    check_layout(module, state, what)
    own = {name: state[name].to(dtype) if state[name].is_floating_point() else state[name] for name in state}
    module.load_state_dict(own, strict=True, assign=True)
    device = next(iter(own.values())).device
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta and device.type != "meta":
                setattr(owner, name, _constant(name, buffer).to(device, buffer.dtype))
    return module.to(dtype).requires_grad_(False).eval()


def _constant(name: str, buffer: Tensor) -> Tensor:
    """A buffer that is not saved with the weights."""
    if name == "position_ids":
        return torch.arange(buffer.shape[-1]).expand(buffer.shape)
    assert name == "attn_mask", f"a buffer {name!r} that nobody can fill"
    return torch.full(buffer.shape, float("-inf")).triu(1)


def check_layout(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError when names or shapes of `state` are not those of the module, naming the first that differs."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    actual = {name: tuple(value.shape) for name, value in state.items()}
    for kind, names in (
        ("lacks", expected.keys() - actual.keys()),
        ("has an unknown", actual.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(
                f"{what} {kind} weight {min(names)!r} ({len(names)} in all): it is of another model; choose the right one"
            )
    for name, shape in expected.items():
        if actual[name] != shape:
            raise ValueError(f"{what}: {name!r} is {actual[name]}, the model needs {shape}; choose the right weights")
