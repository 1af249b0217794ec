"""Functions of the operator's own: the prompt filter and the image checker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from flashdmd_ray.run.messages import typed_line

Hook = Callable[[Any], str | None]
"""prompt or image -> None, or why it is refused."""


def load_hook(path: str | None) -> Hook | None:
    """Import the function at `module:function`; None for None. Its answers are checked at every call.

    Raises ValueError, one line, when it cannot be imported or is no plain function.
    """
    if path is None:
        return None
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (Exception, SystemExit) as error:  # an import runs the operator's code
        raise ValueError(
            f"cannot import {path} ({typed_line(error)}); correct prompt_filter or image_checker"
        ) from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"{path} must be a plain function, it is {'async' if callable(function) else 'none'}")
    return partial(_ask, function, path)


def _ask(function: Callable[[Any], object], path: str, value: Any) -> str | None:
    try:
        reason = function(value)
    except SystemExit as error:  # it would end the process of the service
        raise RuntimeError(f"{path} called sys.exit") from error
    if reason is not None and not isinstance(reason, str):
        raise TypeError(f"{path} returned {reason!r}: it must return None, or a text that says why not")
    return reason
