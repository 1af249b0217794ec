"""`--set key.sub=value`: one setting changed in a tree of settings."""

from __future__ import annotations

from typing import Any

from flashdmd_ray.config.annotations import below, is_optional, is_text, section_of
from flashdmd_ray.config.section import Section
from flashdmd_ray.config.yaml_text import plain_text, read_tree


def apply_override(section: type[Section], tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` in the tree of a section. An item of a list is named by its number: rewards.0.weight=2.

    A text setting is what is written, other values are YAML. Raises ValueError, one line, when the key cannot lead anywhere or the value
    cannot be read whole.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ValueError(f"--set {override}: expected key=value, for example --set steps=100")
    try:
        _set(section, tree, parts, text)
    except ValueError as error:
        raise ValueError(f"--set {override}: {error}") from None


def _set(section: type[Section], tree: dict[str, Any], parts: list[str], text: str) -> None:
    here: Any = tree
    annotation: Any = section
    for depth, part in enumerate(parts, start=1):
        place = _place(here, part, ".".join(parts[: depth - 1]))
        below_it = below(annotation, place)
        if depth == len(parts):
            here[place] = read_value(text, below_it)
            return
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = _default(annotation, part)
        here, annotation = here[place], below_it


def _place(here: Any, part: str, name: str) -> str | int:
    """`part` as a key of a mapping or a number of a list. Raises ValueError for anything else."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise ValueError(f"'{name}' is a single value, it has no key '{part}'")
    if not part.isdecimal():
        raise ValueError(f"'{name}' is a list; name one of its items by number, such as {name}.0")
    if int(part) >= len(here):
        numbered = f"has the items 0 to {len(here) - 1}" if here else "is empty"
        raise ValueError(f"'{name}' {numbered}, no {part}; set '{name}' as a whole")
    return int(part)


def _default(annotation: Any, key: str) -> Any:
    """Value of a setting that nobody gave, as a tree: its default where that is a list, else an empty mapping to fill."""
    section = section_of(annotation)
    field = None if section is None else section.model_fields.get(key)
    default = None if field is None else field.get_default(call_default_factory=True)
    if isinstance(default, tuple | list):
        return [item.model_dump(exclude_unset=True) if isinstance(item, Section) else item for item in default]
    return {}


def read_value(text: str, annotation: Any) -> Any:
    """The value of a setting of this type. Raises ValueError when a part of `text` would be lost."""
    written = text.strip()
    if is_text(annotation) and not written.startswith(("'", '"')):
        return None if is_optional(annotation) and written in ("", "null", "~") else plain_text(written, annotation)
    value, rest = read_tree(written, annotation)
    if rest.strip():
        raise ValueError(f"the value would end before '{rest.strip()}', which is a comment in YAML; put text in quotes")
    return value
