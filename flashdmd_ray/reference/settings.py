"""Settings in words: key, type, bounds, default and docstring, read from the JSON schema of a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flashdmd_ray.config import Config, Section, changeable_keys
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.serving.settings import ServeSettings

JOBS: Mapping[str, type[Section]] = {
    "train": Config,
    "reward train": RewardTrainingConfig,
    "serve": ServeSettings,
}
"""Command -> the settings that it reads."""

_WORDS = {"string": "text", "boolean": "true or false", "null": "null", "object": "section", "integer": "integer"}
_BOUNDS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
}


@dataclass(frozen=True)
class Setting:
    """One key. kind, default: in words; default is '' for a section and for what must be given."""

    key: str
    kind: str
    default: str
    meaning: str
    may_change: bool
    is_section: bool

    @property
    def described(self) -> str:
        """The meaning, and whether a resumed run may have another value."""
        return self.meaning + (" A resumed run may change it." if self.may_change else "")


def settings_of(section: type[Section]) -> list[Setting]:
    """Every setting below a section. An item of a list is called N, an entry of a mapping NAME."""
    schema = section.model_json_schema()
    return list(_walk(schema, schema.get("$defs", {}), "", {}, changeable_keys(section)))


def _walk(
    schema: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, given: Mapping[str, Any], free: tuple[str, ...]
) -> Iterator[Setting]:
    for name, item in schema.get("properties", {}).items():
        key = prefix + name
        below, tail = _section_below(item, defs)
        default = given.get(name, item.get("default", ...))
        nested = default if isinstance(default, Mapping) else {}
        is_section = below is not None and not tail
        yield Setting(
            key,
            "section" if is_section else _kind(item),
            "" if is_section or default is ... else _default(default, below),
            " ".join(item.get("description", "").split()),
            any(key == one or key.startswith(f"{one}.") for one in free),
            below is not None,
        )
        if below is not None:
            yield from _walk(below, defs, f"{key}{tail}.", nested, free)


def _section_below(item: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The section that a setting is or holds, and how its keys begin: '' for itself, '.N' in a list, '.NAME' in a mapping."""
    if "$ref" in item:
        return defs[item["$ref"].rsplit("/", 1)[1]], ""
    for other in item.get("anyOf", ()):
        if "$ref" in other:
            return _section_below(other, defs)
    for word, tail in (("items", ".N"), ("additionalProperties", ".NAME")):
        inner = item.get(word)
        if isinstance(inner, Mapping) and "$ref" in inner:
            return _section_below(inner, defs)[0], tail
    return None, ""


def _kind(item: Mapping[str, Any]) -> str:
    """The type of a setting in words, with its bounds."""
    if "anyOf" in item:
        return " or ".join(dict.fromkeys(map(_kind, item["anyOf"])))
    if "$ref" in item:
        return "section"
    if "enum" in item or "const" in item:
        return " or ".join(json.dumps(value).strip('"') for value in item.get("enum", [item.get("const")]))
    kind = str(item.get("type", "anything"))
    if kind == "array":
        fixed = item.get("prefixItems")
        return f"[{', '.join(map(_kind, fixed))}]" if fixed else f"list of: {_kind(item.get('items', {}))}"
    if kind == "object" and isinstance(item.get("additionalProperties"), Mapping):
        return f"mapping of names to: {_kind(item['additionalProperties'])}"
    if item.get("format") == "path":
        return "path"
    bounds = [f"{words} {item[bound]:g}" for bound, words in _BOUNDS.items() if bound in item]
    return " ".join([_WORDS.get(kind, kind), *([", ".join(bounds)] if bounds else [])])


def _default(value: Any, below: Mapping[str, Any] | None) -> str:
    """A default as it would be written in YAML; sections in a list without what they leave at its default."""
    if below is not None and isinstance(value, list):
        usual = {name: item.get("default", ...) for name, item in below["properties"].items()}
        value = [{name: given for name, given in entry.items() if given != usual[name]} for entry in value]
    return "null" if value is None else value if isinstance(value, str) and value else json.dumps(value)
