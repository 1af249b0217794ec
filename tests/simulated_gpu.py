"""A GPU that is not there: real values on the CPU, each tensor marked with the device it would be on, mixtures refused as CUDA does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_MARK = "_simulated_device"
_FACTORIES = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm),
    *(torch.arange, torch.linspace, torch.tensor, torch.as_tensor, torch.eye, torch.scalar_tensor),
}
_CROSSING = {Tensor.copy_, Tensor.__setitem__}
"""Operations that CUDA allows between devices."""


def device_of(tensor: Tensor) -> torch.device:
    """Where the tensor would be."""
    return getattr(tensor, _MARK, CPU)


def mark(result: Any, device: torch.device) -> Any:
    """The result, with every tensor in it put on the device."""
    for tensor in tensors(result):
        setattr(tensor, _MARK, device)
    return result


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for each in value.values() for tensor in tensors(each))
    elif isinstance(value, list | tuple):
        yield from (tensor for each in value for tensor in tensors(each))


class SimulatedGpu(TorchFunctionMode):
    """Inside this context, tensors are told apart by `device_of`. Raises RuntimeError or TypeError where CUDA would.

    Gradients and what a module's parameters become are followed; kernels that start no Python call (a backward) are not looked at.
    """

    def __enter__(self) -> SimulatedGpu:
        self._make_parameter = nn.Parameter.__new__
        make = self._make_parameter

        def parameter(cls: type, data: Tensor | None = None, requires_grad: bool = True) -> Tensor:
            made: Tensor = make(cls, data, requires_grad)
            return made if data is None else mark(made, device_of(data))

        nn.Parameter.__new__ = parameter  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        nn.Parameter.__new__ = self._make_parameter  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if (answer := _QUESTIONS.get(func)) is not None:
            return answer(args[0])
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return _move(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and device_of(args[0]) == GPU:
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        if "device" in kwargs and (func in _FACTORIES or "_like" in func.__name__ or "new_" in func.__name__):
            return _make(func, args, kwargs)
        return _compute(func, args, kwargs)


def _real_device(tensor: Tensor) -> torch.device:
    real: torch.device = Tensor.device.__get__(tensor)  # type: ignore[attr-defined]
    return real if real.type == "meta" else device_of(tensor)


_QUESTIONS: dict[Any, Callable[[Tensor], Any]] = {
    Tensor.device.__get__: _real_device,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: lambda tensor: device_of(tensor) == GPU,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor: device_of(tensor) == CPU,  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor: 0 if device_of(tensor) == GPU else -1,
}


def _named(device: Any) -> torch.device:
    found = torch.device(device)
    return GPU if found.type == "cuda" else found


def _move(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    source, rest = args[0], list(args[1:])
    target = {Tensor.cuda: GPU, Tensor.cpu: CPU}.get(func, device_of(source))
    for index, value in enumerate(rest):
        if isinstance(value, torch.device | str):
            target = _named(value)
            rest[index] = "meta" if target.type == "meta" else "cpu"
        elif isinstance(value, Tensor):
            target = device_of(value)
    if kwargs.get("device") is not None:
        target = _named(kwargs["device"])
        kwargs["device"] = "meta" if target.type == "meta" else "cpu"
    moved: Tensor = source if func in (Tensor.cuda, Tensor.cpu) else source.to(*rest, **kwargs)
    if target.type != "meta" and target != device_of(source) and moved.data_ptr() == source.data_ptr():
        moved = moved.clone()
    return moved if moved is source else mark(moved, target)


def _make(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    given = kwargs["device"]
    device = device_of(args[0]) if given is None and isinstance(args[0], Tensor) else _named(given or "cpu")
    if given is not None and device.type != "meta":
        kwargs["device"] = "cpu"
    return mark(func(*args, **kwargs), device)


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = list(tensors((args, kwargs)))
    if func is Tensor.__getitem__:  # a tensor on a GPU takes indices from anywhere, one on the CPU only its own
        if device_of(args[0]) == CPU and any(device_of(index) == GPU for index in operands[1:]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        return mark(func(*args, **kwargs), device_of(args[0]))
    if func.__name__ == "__set__":  # .data or .grad
        func(*args, **kwargs)
        return mark(args[0], device_of(args[1])) if isinstance(args[1], Tensor) else None
    devices = {device_of(tensor) for tensor in operands if tensor.ndim or device_of(tensor) == GPU}
    if len(devices) > 1 and func not in _CROSSING and func.__name__ != "_has_compatible_shallow_copy_type":
        where = ", ".join(f"{tuple(tensor.shape)} on {device_of(tensor)}" for tensor in operands)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func.__name__} got {where}")
    result = func(*args, **kwargs)
    if func in _CROSSING:
        return result
    return mark(result, GPU) if GPU in devices else result
