"""JSON of other people."""

from __future__ import annotations

from typing import Any


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text, for `json.loads(text, object_pairs_hook=unique_names)`. Raises ValueError for a name given twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice[:100]}' is given twice")
    return tree
