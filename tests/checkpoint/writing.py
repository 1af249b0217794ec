"""Small checkpoints, written as a run writes them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdmd_ray.checkpoint import Best, CheckpointStore, open_store
from flashdmd_ray.checkpoint.parts import write_part
from flashdmd_ray.run.storage import Location, RemotePath

VALUES = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}
PART = "generator.safetensors"
LOWEST = Best("gap", "min")


def place(kind: str, folder: Path) -> Location:
    """A root of its own: a 'local' folder, a 'memory' store, or a folder used as a 'remote' store, without renames."""
    if kind == "local":
        return folder / "checkpoints"
    return RemotePath(f"memory://{uuid.uuid4().hex}" if kind == "memory" else f"file://{folder}/remote")


def store(root: Location, keep: int = 10, best: Best | None = None, run: str = "run") -> CheckpointStore:
    return open_store(root, run, keep, best)


def write(
    root: Location,
    step: int,
    keep: int = 10,
    best: Best | None = None,
    metrics: Mapping[str, float] | None = None,
    run: str = "run",
    values: Mapping[str, Tensor] = VALUES,
    state: Mapping[str, Any] | None = None,
) -> Location:
    opened = store(root, keep, best, run)
    begun = opened.begin(step)
    path = opened.commit(begun, step, [write_part(begun / PART, values)], state or {"step": step}, metrics or {})
    opened.retire()
    return path
