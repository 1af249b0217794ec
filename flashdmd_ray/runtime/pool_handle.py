"""A pool as the driver calls it. No Ray."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Callee(Protocol):
    """What answers: a pool."""

    def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


class PoolHandle:
    """The role of a pool, with the methods of its class."""

    def __init__(self, pool: Callee) -> None:
        self.pool = pool

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return functools.partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.pool.call(method, args, kwargs)
