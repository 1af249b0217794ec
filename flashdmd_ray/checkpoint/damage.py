"""Damaged checkpoints: found by their checksums, set aside and said, or refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from flashdmd_ray.checkpoint.manifest import MANIFEST, DamagedCheckpoint, newest_first, verify_checkpoint
from flashdmd_ray.checkpoint.selection import explain_damage
from flashdmd_ray.checkpoint.store import BEGUN, free_name
from flashdmd_ray.run.storage import Location, RemotePath, children

log = logging.getLogger(__name__)

ASIDE = "damaged-"
"""Beginning of the name of a checkpoint that was set aside."""


def newest_whole(root: Location, on_damage: Literal["previous", "refuse"]) -> Location | None:
    """Return the newest checkpoint that is what was written; None when there is none at all.

    Damaged ones before it are set aside and said. Raises DamagedCheckpoint, a ValueError, for one when `on_damage` is 'refuse', and when
    there is no whole one. Of tensors in a store only the sizes are compared: see `pass_over`.
    """
    damaged: list[tuple[Location, DamagedCheckpoint]] = []
    for folder in newest_first(root):
        try:
            whole = verify_checkpoint(folder)
        except DamagedCheckpoint as error:
            damaged.append((folder, error))
            if on_damage == "refuse":
                break
        else:
            for each, found in damaged:
                set_aside(root, each, found, whole)
            return whole
    if damaged:
        with explain_damage(root):
            raise damaged[0][1]
    return None


def pass_over(
    root: Location, folder: Location, found: DamagedCheckpoint, on_damage: Literal["previous", "refuse"]
) -> None:
    """Set aside a checkpoint whose damage showed when it was loaded. Raises `found` when there is none to go back to, or it is refused."""
    older = [other for other in newest_first(root) if other.name != folder.name]
    if on_damage == "refuse" or not older:
        with explain_damage(root):
            raise found
    set_aside(root, folder, found, older[0])


def set_aside(root: Location, folder: Location, found: DamagedCheckpoint, instead: Location) -> None:
    """Take a checkpoint out of the row without removing it, and say so.

    In a file system it gets another name. In a store, where a rename would be a copy of everything, its manifest does.
    """
    name = free_name(f"{ASIDE}{folder.name}", {child.name for child in children(root)})
    if isinstance(folder, Path):
        folder.rename(folder.with_name(name))
    else:
        assert isinstance(folder, RemotePath)
        name = f"{folder.name} without its {MANIFEST}"
        (folder / f"{ASIDE}{MANIFEST}").write_bytes((folder / MANIFEST).read_bytes())
        (folder / BEGUN).unlink()  # so that nobody takes it for unfinished and removes it
        (folder / MANIFEST).unlink()
    log.warning("%s; going back to %s. The damaged one is kept as %s (checkpoint.on_damage)", found, instead.name, name)
