"""Questions about the type of a setting: which settings lie below it, and how its value is written."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from flashdmd_ray.config.section import Section


def alternatives(annotation: Any) -> list[Any]:
    """The types that a union allows, without None and without the checks of Annotated; one type for what is no union."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [found for part in get_args(annotation) for found in alternatives(part)]
    return [] if annotation is NoneType else [annotation]


def section_of(annotation: Any) -> type[Section] | None:
    """The section of settings that a value of this type is, if it is one."""
    return next((a for a in alternatives(annotation) if isinstance(a, type) and issubclass(a, Section)), None)


def below(annotation: Any, key: str | int) -> Any:
    """The type of the setting `key`, or of item number `key` of a list; Any where nothing is known of it."""
    section = section_of(annotation)
    if section is not None:
        return section.model_fields[str(key)].annotation if key in section.model_fields else Any
    for kind in alternatives(annotation):
        arguments = get_args(kind)
        if get_origin(kind) is dict:
            return arguments[1]
        if get_origin(kind) in (tuple, list) and isinstance(key, int):
            fixed = arguments[1:] != (Ellipsis,) and get_origin(kind) is tuple
            return arguments[min(key, len(arguments) - 1)] if fixed else arguments[0]
    return Any


def keys_below(annotation: Any) -> list[str]:
    """The names of the settings of a section; none for anything else."""
    section = section_of(annotation)
    return [] if section is None else list(section.model_fields)


def is_text(annotation: Any) -> bool:
    """True where a value is text, so that 007, on and 2026-11-29 are names and not a number, a switch and a day."""
    kinds = alternatives(annotation)
    return bool(kinds) and all(
        kind in (str, Path) or (get_origin(kind) is Literal and all(isinstance(v, str) for v in get_args(kind)))
        for kind in kinds
    )


def is_optional(annotation: Any) -> bool:
    """True where null is allowed."""
    if get_origin(annotation) is Annotated:
        return is_optional(get_args(annotation)[0])
    return annotation in (Any, NoneType) or any(is_optional(a) for a in get_args(annotation) if _is_union(annotation))


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)
