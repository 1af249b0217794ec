"""Between the driver, whose tensors lie on the CPU, and roles whose networks may be on a GPU. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flashdmd_ray.batch import move

CPU = torch.device("cpu")


def call_role(role: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`role.method(...)` with every tensor of the arguments on the role's device, and those of the result on the CPU.

    A role says where it computes by `device`; one that does not is on the CPU.
    """
    device = getattr(role, "device", CPU)
    result = getattr(role, method)(*move(args, device), **move(dict(kwargs), device))
    return move(result, CPU)


class RoleOnDevice:
    """A role of this process whose networks are on a GPU, called like one whose networks are on the CPU."""

    def __init__(self, role: Any) -> None:
        self._role = role

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            neighbours = tuple(value._role if isinstance(value, RoleOnDevice) else value for value in args)
            return call_role(self._role, method, neighbours, kwargs)

        return call


def at_border(role: Any) -> Any:
    """The role as the driver of the same process calls it."""
    return role if getattr(role, "device", CPU) == CPU else RoleOnDevice(role)
