"""Checkpoints: complete or not there.

A checkpoint is a folder `step-00000050` of safetensors and JSON files. Every process that holds tensors writes them itself, beside the
training (`parts`); the driver waits for all parts (`saver`) and commits (`store`) with `manifest.json`, which lists sizes and SHA-256
sums, as the last file. A process killed at any moment leaves the checkpoints before it as they were. "Newest" means written last, not
the largest step: a run continued from an earlier step writes newer checkpoints with smaller steps.
"""

from flashdmd_ray.checkpoint.damage import newest_whole, pass_over
from flashdmd_ray.checkpoint.manifest import (
    DamagedCheckpoint,
    Part,
    manifests,
    read_manifest,
    read_state,
    verify_checkpoint,
)
from flashdmd_ray.checkpoint.parts import Destination, PartFile, Saved, save_part
from flashdmd_ray.checkpoint.selection import (
    Best,
    explain_damage,
    latest_checkpoint,
    latest_step,
    newest_healthy,
    select_checkpoint,
)
from flashdmd_ray.checkpoint.store import CheckpointStore, open_store
from flashdmd_ray.checkpoint.tensors import load_tensors, save_tensors

__all__ = [
    "Best",
    "CheckpointStore",
    "DamagedCheckpoint",
    "Destination",
    "Part",
    "PartFile",
    "Saved",
    "explain_damage",
    "latest_checkpoint",
    "latest_step",
    "load_tensors",
    "manifests",
    "newest_healthy",
    "newest_whole",
    "open_store",
    "pass_over",
    "read_manifest",
    "read_state",
    "save_part",
    "save_tensors",
    "select_checkpoint",
    "verify_checkpoint",
]
