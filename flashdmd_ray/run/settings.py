"""Settings that a resumed run must share with the run it goes on with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flashdmd_ray.config import Section, changeable_keys


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2, {"d": 3}]} -> {"a.b": 1, "c": ...}; lists with mappings are numbered, other lists stay one value."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(index), item) for index, item in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def fixed_settings(kind: type[Section], tree: Mapping[str, Any], also_free: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings in `tree`, a configuration of that kind as JSON values, that a resumed run must share, by dotted key.

    also_free: keys, or sections, to leave out beside those that are marked `MayChange`.
    """
    return without(flatten(json.loads(json.dumps(tree, default=str))), (*changeable_keys(kind), *also_free))


def without(settings: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Settings by dotted key without those keys, or sections."""
    return {
        key: value
        for key, value in settings.items()
        if not any(key == name or key.startswith(f"{name}.") for name in keys)
    }


SECOND_STAGE = ("preference", "rewards")
"""Sections that nothing has read as long as a run has made no preference update: a finished distillation can be given a second stage."""


def settings_not_used_yet(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """SECOND_STAGE when the metrics of a joint training run say that it has made no preference update, else nothing."""
    counted = [record["count/preference_updates"] for record in records if "count/preference_updates" in record]
    return SECOND_STAGE if counted and not counted[-1] else ()


def changed_settings(saved: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first three differences in words, '' when there are none."""
    changes = [
        f"{key} was {saved.get(key, 'not set')} and is now {new.get(key, 'not set')}"
        for key in dict.fromkeys([*saved, *new])
        if saved.get(key) != new.get(key)
    ]
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
