"""Tensors without values: whatever is drawn at random, or comes from a network, lies on the meta device and passes through real code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map


def without_values(tensor: Any) -> bool:
    """Return True for a tensor on the meta device."""
    return isinstance(tensor, Tensor) and tensor.is_meta


class DryTensors(TorchFunctionMode):
    """Inside this context noise has no values, and what it meets loses its own.

    Indices, timesteps and metrics' counts stay real CPU values: they are discrete choices of the driver. Where code reads a number of a
    tensor without values, a plausible one is answered: 1.0, 1 or True. A copy to another device is none.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, device="meta")
        if not tree_any(without_values, (args, kwargs)):
            return func(*args, **kwargs)
        if (answer := _ANSWERS.get(func)) is not None:
            return answer(args[0])
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _to(*args, **kwargs)
        if func is F.one_hot:
            return torch.empty(*args[0].shape, args[1], dtype=torch.int64, device="meta")
        if func.__name__ != "backward" and "__get__" not in func.__name__:
            args, kwargs = tree_map(_without_value, (args, kwargs))
        return func(*args, **kwargs)


def _without_value(value: Any) -> Any:
    """A real tensor that meets one without values."""
    return value.detach().to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The change of type alone."""
    dtypes = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.dtype)]
    dtypes += [each.dtype for each in args if isinstance(each, Tensor)]
    return tensor.to(dtypes[0]) if dtypes else tensor


def _list(tensor: Tensor) -> Any:
    return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()


def _finite(tensor: Tensor) -> Tensor:
    """Real, and all of it: no check of values stops a dry step."""
    return torch.ones(tensor.shape, dtype=torch.bool)


_ANSWERS: dict[Any, Callable[[Tensor], Any]] = {
    torch.isfinite: _finite,
    Tensor.isfinite: _finite,
    Tensor.item: _list,
    Tensor.tolist: _list,
    Tensor.__bool__: lambda tensor: True,
    Tensor.__float__: lambda tensor: 1.0,
    Tensor.__int__: lambda tensor: 1,
    Tensor.__index__: lambda tensor: 1,
}
