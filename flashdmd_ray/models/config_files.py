"""JSON configurations and tokenizer files in a model's folder: are they there, whole, and of a kind that is read? Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.models.headers import ModelFileError, refuse_stand_in

_TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
)
"""Files that a tokenizer is read from; one set of them is enough."""


def read_json(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


def check_json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in that file. Raises ModelFileError when it is missing, no JSON object, or lacks a key."""
    if not path.exists():
        raise ModelFileError(f"{path} is missing; download or make the model again")
    refuse_stand_in(path)
    try:
        tree: Any = read_json(path)
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        raise ModelFileError(f"{path} is damaged (no JSON object); download or make the model again")
    for key in keys:
        if key not in tree:
            raise ModelFileError(
                f"{path} lacks '{key}': it is damaged or describes another kind of model; choose another path"
            )
    config: dict[str, Any] = tree
    return config


def check_module(path: Path, keys: Sequence[str] = (), class_name: str | None = None) -> dict[str, Any]:
    """The config.json of one module, as `check_json`.

    class_name: of the diffusers class that reads it. Raises ModelFileError also for another class and for quantised weights.
    """
    config = check_json(path, keys)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        kind = method.get("quant_method", "an unknown method") if isinstance(method, Mapping) else method
        raise ModelFileError(
            f"{path} describes quantised weights ({kind}); use the model's float32, bfloat16 or float16 weights"
        )
    if class_name is not None and config.get("_class_name", class_name) != class_name:
        raise ModelFileError(f"{path} describes a {config['_class_name']}, not a {class_name}; choose another model")
    return config


def check_tokenizer(folder: Path) -> None:
    """Raises ModelFileError when the folder lacks the files of a tokenizer."""
    for names in _TOKENIZERS:
        if all((folder / name).exists() for name in names):
            for name in names:
                refuse_stand_in(folder / name)
            return
    raise ModelFileError(
        f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); download or make the model again"
    )
