"""Transfer of tensors between the driver, on the CPU, and roles whose networks may be on a GPU. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flashdmd_ray.batch import move

CPU = torch.device("cpu")


def call_role(role: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call `role.method(...)` with the arguments' tensors on the role's device; those of the result come back on the CPU.

    A role without an attribute `device` is on the CPU.
    """
    device = getattr(role, "device", CPU)
    result = getattr(role, method)(*move(args, device), **move(dict(kwargs), device))
    return move(result, CPU)


class RoleOnDevice:
    """Handle of a role of this process whose networks are on a GPU, called like one whose networks are on the CPU."""

    def __init__(self, role: Any) -> None:
        self._role = role

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            neighbours = tuple(value._role if isinstance(value, RoleOnDevice) else value for value in args)
            return call_role(self._role, method, neighbours, kwargs)

        return call


def at_border(role: Any) -> Any:
    """Return the role in the form that the driver of the same process calls."""
    return role if getattr(role, "device", CPU) == CPU else RoleOnDevice(role)
