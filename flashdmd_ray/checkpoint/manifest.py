"""List of a checkpoint's files, with sizes and SHA-256 sums: `manifest.json`, the last of them to be written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashdmd_ray.run.storage import Location, children, size

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-(\d{8,})(\.\d+)?")


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is missing or not what was written. The message names it."""


@dataclass(frozen=True)
class Part:
    """One file as it was written. sha256: of its content, hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    serial: grows with every checkpoint written to one place. run: whose it is. metrics: what retention may judge it by.
    """

    folder: Location
    step: int
    serial: int
    run: str
    metrics: Mapping[str, float]
    files: Mapping[str, Part]

    def to_json(self) -> bytes:
        files = {name: {"bytes": part.bytes, "sha256": part.sha256} for name, part in sorted(self.files.items())}
        tree = {"format": FORMAT, "step": self.step, "serial": self.serial, "run": self.run}
        return json.dumps(tree | {"metrics": dict(self.metrics), "files": files}, indent=1).encode()


def read_manifest(folder: Location) -> Manifest:
    """Read a checkpoint's manifest.

    Raises DamagedCheckpoint when it is missing or damaged, and what the store raises when it cannot be reached.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_text())
        is_supported = tree["format"] == FORMAT
        files = {name: Part(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in tree["files"].items()}
        metrics = {str(name): float(value) for name, value in tree.get("metrics", {}).items()}
        manifest = Manifest(folder, int(tree["step"]), int(tree["serial"]), str(tree.get("run", "")), metrics, files)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: cannot read {MANIFEST} ({error})") from None
    if not is_supported:
        raise DamagedCheckpoint(f"checkpoint {folder}: {MANIFEST} has a format that this version does not know")
    return manifest


def read_state(folder: Location) -> dict[str, Any]:
    """Read the driver's JSON of a checkpoint. Raises DamagedCheckpoint, a ValueError, when it cannot be read."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: cannot read {STATE} ({error})") from None
    assert isinstance(state, dict)
    return state


def newest_first(root: Location) -> list[Location]:
    """List checkpoint folders, the newest first; one whose manifest cannot be read comes first, so that it is noticed.

    In a store the manifest is the commit: a folder without one is unfinished, so no checkpoint.
    """
    serials = {
        folder: _serial(folder) for folder in children(root) if NAME.fullmatch(folder.name) and is_committed(folder)
    }
    return sorted(serials, key=lambda f: (serials[f] is None, serials[f] or 0, f.name), reverse=True)


def is_committed(folder: Location) -> bool:
    """Return True when a folder with a checkpoint's name was finished: by its rename in a file system, by its manifest in a store."""
    if isinstance(folder, Path):
        return folder.is_dir()
    try:
        return (folder / MANIFEST).size() > 0  # an empty one: the process ended between creating and writing it
    except FileNotFoundError:
        return False


def manifests(root: Location) -> list[Manifest]:
    """Read the manifests of all checkpoints, newest first; one that cannot be read is left out."""
    readable = []
    for folder in newest_first(root):
        try:
            readable.append(read_manifest(folder))
        except DamagedCheckpoint:
            continue
    return sorted(readable, key=lambda manifest: manifest.serial, reverse=True)


def verify_checkpoint(folder: Location) -> Location:
    """Return `folder` if it is a complete checkpoint; raises ValueError when there is none, and its subclass
    DamagedCheckpoint naming the file that is missing or differs.

    Of tensors in a store only the sizes are compared: `load_tensors` checks their contents when it fetches them.
    """
    if not is_committed(folder):
        raise ValueError(f"no checkpoint at {folder}: name a directory such as runs/demo/checkpoints/step-00000050")
    for part in read_manifest(folder).files.values():
        try:
            actual = _describe_file(folder / part.name, part)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"checkpoint {folder}: {part.name} is missing") from None
        check_same(part, actual, folder)
    return folder


def check_same(written: Part, actual: Part, folder: Location) -> None:
    """Raise DamagedCheckpoint when a file is not what was written."""
    if actual != written:
        raise DamagedCheckpoint(
            f"checkpoint {folder}: {written.name} is not what was written (size or SHA-256 differs)"
        )


def describe(name: str, file: Path) -> Part:
    """Return size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return Part(name, file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


def describe_bytes(name: str, data: bytes) -> Part:
    """Return size and SHA-256 of a file's content."""
    return Part(name, len(data), hashlib.sha256(data).hexdigest())


def _describe_file(file: Location, expected: Part) -> Part:
    if isinstance(file, Path):
        return describe(expected.name, file)
    if expected.name == STATE:
        return describe_bytes(STATE, file.read_bytes())
    return Part(expected.name, size(file), expected.sha256)


def _serial(folder: Location) -> int | None:
    try:
        return read_manifest(folder).serial
    except DamagedCheckpoint:
        return None
