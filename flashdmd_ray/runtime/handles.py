"""Handles of roles in other processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from flashdmd_ray.runtime.call_times import CallTimes, Reply


class Owner(Protocol):
    """Stateful group or pool."""

    def call(
        self, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False
    ) -> Reply: ...


class RoleHandle:
    """Handle of a role that runs in other processes, with the methods of its class."""

    def __init__(self, owner: Owner, group: str, role: str, times: CallTimes) -> None:
        """group: under which `times` counts its calls."""
        self.owner = owner
        self.group = group
        self.role = role
        self.times = times

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        trace_to = self.times.trace_to
        reply = self.owner.call(self.role, method, args, kwargs, trace_to is not None)
        self.times.add(self.group, self.role, method, reply.spent, trace_to)
        return reply.result
