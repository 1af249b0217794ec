"""Transfer of tensors between the driver, on the CPU, and roles whose networks may be on a GPU. No Ray."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from flashdmd_ray.batch import move
from flashdmd_ray.runtime.call_times import CallTimes, Reply, metered

CPU = torch.device("cpu")


def call_role(role: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False) -> Reply:
    """Call `role.method(...)` with the arguments' tensors on the role's device; those of the result come back on the CPU.

    A role without an attribute `device` is on the CPU. traced: under torch's profiler.
    """
    device = getattr(role, "device", CPU)

    def call() -> Any:
        return move(getattr(role, method)(*move(args, device), **move(dict(kwargs), device)), CPU)

    return metered(call, device, traced)


class RoleHere:
    """Handle of a role of this process, called like one whose networks are on the CPU. Its attributes can be read."""

    def __init__(self, group: str, name: str, role: Any, times: CallTimes) -> None:
        """group, name: under which `times` counts its calls."""
        self._group, self._name = group, name
        self._role = role
        self._times = times

    def __getattr__(self, method: str) -> Any:
        found = getattr(self._role, method)
        if not inspect.ismethod(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            neighbours = tuple(value._role if isinstance(value, RoleHere) else value for value in args)
            trace_to = self._times.trace_to
            reply = call_role(self._role, method, neighbours, kwargs, trace_to is not None)
            self._times.add(self._group, self._name, method, reply.spent, trace_to)
            return reply.result

        return call
