"""YAML files and overrides to sections of settings, and back. Each problem becomes one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flashdmd_ray.config.annotations import below, keys_below
from flashdmd_ray.config.joint import Config
from flashdmd_ray.config.overrides import apply_override
from flashdmd_ray.config.section import Section, local_path, suggestion
from flashdmd_ray.config.yaml_text import read_tree

PRESETS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "presets").glob("*.yaml"))}
"""Name -> file of the configurations that the package brings."""
_Section = TypeVar("_Section", bound=Section)


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """`load_as` of a joint training run; the preset `demo` when `source` is None."""
    return load_as(Config, "demo" if source is None else source, overrides)


def load_as(section: type[_Section], source: str | Path, overrides: Sequence[str] = ()) -> _Section:
    """Read a YAML file or a preset, apply `key.sub=value` overrides and validate it as that section.

    Raises ValueError, one line per problem, naming the key, what is wrong and the remedy.
    """
    tree = read_file(config_file(source), section)
    for override in overrides:
        apply_override(section, tree, override)
    return validated(section, tree)


def config_file(source: str | Path) -> Path:
    """The file that `source` names: a path, or else the name of a preset. Raises ValueError for a bare word that is neither."""
    path, name = local_path(source), str(source)
    if path.is_file() or path.suffix or path.name != name or "=" in name:
        return path
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"{name}: no file and no preset{suggestion(name, list(PRESETS))}; the presets are {known}")
    return PRESETS[name]


def read_file(path: Path, section: type[Section]) -> dict[str, Any]:
    """The settings that a YAML file states. Raises ValueError, one line, when it cannot be read."""
    try:
        tree, _ = read_tree(path.read_bytes(), section)
    except OSError as error:
        remedy = f"did you mean --set {path}?" if "=" in path.name else "give the path of a YAML file"
        raise ValueError(f"{path}: cannot read the configuration ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(tree, dict | None):
        raise ValueError(f"{path}: expected keys and values at the top level, found a {type(tree).__name__}")
    return tree or {}


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping. Raises ValueError like `load_config`."""
    return validated(Config, tree)


def validated(section: type[_Section], tree: Mapping[str, Any]) -> _Section:
    """`tree` as a section of settings. Raises ValueError, one line per problem, naming the key and the remedy."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_describe(section, detail) for detail in error.errors())
        raise ValueError("\n".join(lines)) from None


def _describe(section: type[Section], detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parents, key = detail["loc"][:-1], str(detail["loc"][-1])
        return f"{where}: unknown key{suggestion(key, _keys_at(section, parents))}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}{_remedy(detail)}"


def _remedy(detail: ErrorDetails) -> str:
    """'; ...' where the kind of a mistake says how to write the value, else ''."""
    value, kind = detail["input"], detail["type"]
    if value is None:
        return "; leave the key out for its default"
    if kind == "string_type":
        return "; put text in quotes"
    if kind in ("tuple_type", "list_type") and isinstance(value, str | int | Mapping):
        return f"; write a list: [{'...' if isinstance(value, Mapping) else value}]"
    if kind == "model_type":
        return "; write its keys and values, such as {key: value}"
    if kind.startswith("int_") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _keys_at(root: type[Section], location: Sequence[int | str]) -> list[str]:
    annotation: Any = root
    for part in location:
        annotation = below(annotation, part)
    return keys_below(annotation)


def dump_changes(config: Section) -> str:
    """The settings that differ from the defaults, as YAML. Loaded again, they give the same configuration."""
    lean = config.model_dump(mode="json", exclude_defaults=True)
    changed = _differences(config.model_dump(mode="json"), type(config)().model_dump(mode="json"), lean)
    return yaml.safe_dump(changed, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _differences(tree: Mapping[str, Any], defaults: Mapping[str, Any], lean: Mapping[str, Any]) -> dict[str, Any]:
    """lean: the same tree; a list's items, which have no defaults of their place, are written as there."""
    differences: dict[str, Any] = {}
    for key, value in tree.items():
        usual, short = defaults.get(key), lean.get(key)
        if value == usual:
            continue
        if isinstance(value, Mapping) and isinstance(usual, Mapping):
            differences[key] = _differences(value, usual, short or {})
        else:
            differences[key] = short if value and isinstance(value, list) else value
    return differences


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML, ready to be run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
