"""YAML text to a tree of settings, without the surprises of YAML.

A key that is given twice is refused. Text settings keep what is written, so that `name: 007` is a name. Numbers are read as everyone
writes them: 1e-5 is one, and 010 or 1:30, which YAML 1.1 reads as 8 and 90, are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from flashdmd_ray.config.annotations import below, is_text

FLOAT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+")
SURPRISING = re.compile(r"[-+]?(0[0-9_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")
_NULL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "int", "float"))


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


def _value(loader: yaml.SafeLoader, node: yaml.Node, annotation: Any, where: str) -> Any:
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
    is_plain = node.style is None
    if is_plain and is_text(annotation) and node.tag != _NULL:
        return node.value
    if is_plain and node.tag in (_INT, _FLOAT) and SURPRISING.fullmatch(node.value):
        value = loader.construct_object(node)
        raise ValueError(
            f"{where.rstrip('.')}: YAML reads {node.value} as {value}; write {value}, or '{node.value}' in quotes for text".lstrip(
                ": "
            )
        )
    if is_plain and FLOAT.fullmatch(node.value):
        return float(node.value)
    try:
        return loader.construct_object(node)
    except ValueError as error:  # a day that no month has
        raise ValueError(
            f"{where.rstrip('.')}: cannot read {node.value} ({error}); put text in quotes".lstrip(": ")
        ) from None


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
