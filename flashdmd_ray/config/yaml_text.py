"""YAML text to a tree of settings, without the surprises of YAML.

A key that is given twice is refused. Text settings keep what is written, so that `name: 007` is a name. Numbers are read as everyone
writes them: 1e-5 is one, and 010 or 1:30, which YAML 1.1 reads as 8 and 90, are refused. So are `no` where nothing says that a switch is
meant, days, and tags such as !env.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from flashdmd_ray.config.annotations import alternatives, below, is_optional, is_text

MOST_VALUES = 100_000
FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")
SURPRISING = re.compile(r"[-+]?(0[0-9_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")
_NULL, _INT, _FLOAT, _BOOL, _STR, _SEQ, _MAP = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "int", "float", "bool", "str", "seq", "map")
)
_TAGS = {yaml.MappingNode: (_MAP,), yaml.SequenceNode: (_SEQ,), yaml.ScalarNode: (_NULL, _INT, _FLOAT, _BOOL, _STR)}


def read_tree(text: bytes | str, annotation: Any) -> tuple[Any, str]:
    """The value that `text` states for a setting of this type, and what follows it: white space or a comment.

    bytes: UTF-8, or UTF-16 with a byte order mark. Raises ValueError, one line, for text that is no YAML or states a key twice.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, ""
            if _values_in(node, {}) > MOST_VALUES:
                raise ValueError("not valid YAML (its aliases make it too large)")
            rest = "" if isinstance(text, bytes) else text[node.end_mark.index :]
            return _value(loader, node, annotation, ""), rest
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        if error.encoding != "unicode":
            raise ValueError(f"not {error.encoding.upper()} text ({error.reason}); save it as UTF-8") from None
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ValueError("not valid YAML (nested too deeply)") from None


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node becomes when its aliases are replaced, which can double at every line."""
    if id(node) not in known:
        known[id(node)] = 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        if not isinstance(node, yaml.ScalarNode):
            known[id(node)] += sum(_values_in(part, known) for part in parts)
    return known[id(node)]


def _value(loader: yaml.SafeLoader, node: yaml.Node, annotation: Any, where: str) -> Any:
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if is_plain and is_text(annotation) and node.tag != _NULL and not node.tag.startswith("!"):
        return plain_text(node.value, annotation, where)
    if node.tag not in _TAGS[type(node)]:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        is_day = is_plain and tag == "!!timestamp"
        raise _refused(
            where,
            f"{node.value} is a day in YAML; leave it out" if is_day else f"nothing is known of {tag}; leave it out",
        )
    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, where)
        loader.flatten_mapping(node)
        return {
            _key(loader, key): _value(loader, value, below(annotation, key.value), f"{where}{key.value}.")
            for key, value in node.value
        }
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, below(annotation, i), f"{where}{i}.") for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    value = float(node.value) if is_plain and FLOAT.fullmatch(node.value) else loader.construct_object(node)
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(where, f"{node.value} is no finite number; write another one")
    if is_plain and _surprises(node, annotation):
        read = str(value).lower()
        raise _refused(where, f"YAML reads {node.value} as {read}; write {read}")
    return value


def plain_text(written: str, annotation: Any, where: str = "") -> str:
    """A text setting without quotes. Raises ValueError for Python's None where null is meant."""
    if written.lower() == "none" and is_optional(annotation):
        raise _refused(where, f"{written} is a text, as any word; write null")
    return written


def _surprises(node: yaml.ScalarNode, annotation: Any) -> bool:
    """True where YAML 1.1 reads something else than is written: 010, 1:30, or `no` in a place that is not known to be a switch."""
    if node.tag == _BOOL:
        return node.value.lower() not in ("true", "false") and bool not in alternatives(annotation)
    return node.tag in (_INT, _FLOAT) and SURPRISING.fullmatch(node.value) is not None


def _refused(where: str, reason: str) -> ValueError:
    return ValueError(f"{where.rstrip('.')}: {reason}, or put text in quotes".lstrip(": "))


def _key(loader: yaml.SafeLoader, key: yaml.Node) -> Any:
    if not isinstance(key, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(None, None, "found a list or mapping as a key", key.start_mark)
    return key.value


def _refuse_duplicates(node: yaml.MappingNode, where: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.value in lines:
            raise ValueError(
                f"{where}{key.value}: given twice, in line {lines[key.value]} and in line {line}; keep one of them"
            )
        lines[key.value] = line
