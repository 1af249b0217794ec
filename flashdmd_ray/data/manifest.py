"""The manifest of embeddings and latents computed before a run: which files there are, and what they were made with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flashdmd_ray.config import Config, ModelConfig

MANIFEST = "manifest.json"
FORMAT = 1
Key = Mapping[str, Any]


def known_facts(what: str, model: ModelConfig) -> Key:
    """Facts that need no weights: what was computed ("embeddings" or "latents"), and of which model."""
    path = model.teacher if what == "embeddings" else model.vae or model.teacher
    return {"kind": what, "family": model.family, "model": path}


def check_stored(config: Config, what: str) -> None:
    """Raises ValueError, one line, where data.embeddings or data.latents lacks files or was plainly made for another model."""
    folder, setting = getattr(config.data, what), f"data.{what}"
    if folder is None:
        return
    manifest = read_manifest(folder, setting)
    wanted = dict(known_facts(what, config.model))
    if what == "latents" and config.model.resolution is not None:
        wanted["resolution"] = list(config.model.resolution)
    check_key({name: manifest["key"].get(name) for name in wanted}, wanted, folder, setting)
    for entry in manifest["shards"]:
        open_shard(folder / entry["file"], "np")


def open_shard(path: Path, framework: str) -> Any:
    """The tensors of a file, unread. Raises ValueError when it is missing or damaged."""
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}); precompute it again") from None


def read_manifest(folder: Path, setting: str) -> dict[str, Any]:
    """Raises ValueError when there is none, it cannot be read or it names files outside the folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest["key"], dict)
        known = known and all(e["rows"] >= 0 and Path(e["file"]).name == e["file"] for e in manifest["shards"])
    except OSError:
        raise ValueError(
            f"{setting}: {folder} has no {MANIFEST}; precompute with flashdmd data, or let it finish"
        ) from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{setting}: {folder / MANIFEST} cannot be read; precompute again") from None
    return dict(manifest)


def check_key(found: Key, wanted: Key, folder: Path, setting: str) -> None:
    """Raises ValueError when files were computed for something else than `wanted`."""
    different = [
        f"{name} is {found.get(name)} and the run's {wanted.get(name)}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"{setting}: {folder} was computed for something else ({'; '.join(different)}); precompute again, or set it to null"
        )
