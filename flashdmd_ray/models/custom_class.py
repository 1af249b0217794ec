"""A reward class of the user's own, named by its import path: is it there, and does it take its options? Imports no torch itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from flashdmd_ray.config.section import suggestion
from flashdmd_ray.run.messages import typed_line


def import_class(path: str, options: Mapping[str, Any]) -> Any:
    """The class at "package.module:Class", which is not built.

    Raises ValueError, one line, when it is not there, has no method score(images, texts), or takes other keyword arguments.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"there is no module {module_name}; install it, or add its folder to PYTHONPATH") from None
        raise ValueError(f"cannot import the reward {path}: {typed_line(error)}; install that too") from error
    except (Exception, SystemExit) as error:  # an import runs the user's code
        raise ValueError(
            f"cannot import the reward {path}: {typed_line(error)}; it must be importable where workers run"
        ) from error
    if not hasattr(module, name):
        classes = [own for own, value in vars(module).items() if inspect.isclass(value)]
        raise ValueError(f"the module {module_name} has no class {name}{suggestion(name, classes)}; correct the path")
    reward_class = getattr(module, name)
    method = getattr(reward_class, "score", None)
    if not inspect.isclass(reward_class) or not callable(method):
        raise ValueError(f"the reward {path} must be a class with a method score(images, texts)")
    _check_call(f"{path}.score must take (images, texts), it is score", method, (None, None, None), {})
    _check_call(f"{path} cannot be built with options {dict(options)}: it is {name}", reward_class, (), options)
    return reward_class


def _check_call(complaint: str, called: Any, positional: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # written in C: its call will tell
        return
    try:
        signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{complaint}{signature} ({error})") from None
