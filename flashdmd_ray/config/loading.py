"""From YAML and overrides to sections of settings, and back. What is wrong becomes one line for each problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flashdmd_ray.config.joint import Config
from flashdmd_ray.config.section import Section, suggestion

DEFAULT_CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"
_Section = TypeVar("_Section", bound=Section)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """`load_as` of a joint training run; the shipped demo when `path` is None."""
    return load_as(Config, DEFAULT_CONFIG if path is None else path, overrides)


def load_as(section: type[_Section], path: Path, overrides: Sequence[str] = ()) -> _Section:
    """Read a YAML file, apply `key.sub=value` overrides and validate it as that section.

    Raises ValueError, one line per problem, naming the key, what is wrong and the remedy.
    """
    source = Path(path)
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{source}: cannot read the configuration ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{source}: expected keys and values at the top level, found a {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return validated(section, tree)


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


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` (a YAML value) in a nested mapping. Raises ValueError when it is not of that form."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ValueError(f"--set {override}: expected key=value, for example --set steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: the value is not valid YAML; quote it") from None
    for depth, part in enumerate(parts[:-1], start=1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(
                f"--set {override}: '{'.'.join(parts[:depth])}' is a single value or a list, it has no key '{parts[depth]}'"
            )
    tree[parts[-1]] = value


def _describe(section: type[Section], detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parents, key = detail["loc"][:-1], str(detail["loc"][-1])
        return f"{where}: unknown key{suggestion(key, _keys_at(section, parents))}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _keys_at(root: type[Section], location: Sequence[int | str]) -> list[str]:
    section: Any = root
    named = False  # the next part is a name of the user's, in a mapping of sections
    for part in location:
        if isinstance(part, int) or named:
            named = False
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
        named = get_origin(annotation) is dict
    return list(section.model_fields)


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML, ready to be run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
