"""Facts about families, rewards and published models that need no torch: what the rest of the package looks up by name."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import Any


def import_object(reference: str) -> Any:
    """The object at "package.module:name" or "package.module:Class.name", imported now."""
    module, _, name = reference.partition(":")
    return attrgetter(name)(import_module(module))
