"""Checkpoints of one run in one place: begun, committed, retired. One process at a time writes to a place.

In a file system a checkpoint is written under a temporary name, flushed, and renamed: it is complete or not there. Object stores have no
rename, so there the manifest, written last, is the commit, and a folder without one is unfinished.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flashdmd_ray.checkpoint.manifest import (
    MANIFEST,
    NAME,
    STATE,
    Manifest,
    Part,
    describe_bytes,
    is_committed,
    manifests,
)
from flashdmd_ray.checkpoint.selection import Best, newest_healthy
from flashdmd_ray.run.storage import Location, RemotePath, size

BEGUN = "begun.json"
"""In a store: says whose unfinished checkpoint a folder is. The first of its files to be written, the last to go."""


class CheckpointStore(ABC):
    """Writer of a run's checkpoints.

    run: marks this run's checkpoints; no others are removed. keep: number of the newest that stay (>= 1), beside the best and the newest
    that the hack monitor found healthy.
    """

    def __init__(self, root: Location, run: str, keep: int, best: Best | None) -> None:
        assert keep >= 1
        assert run
        self.root: Location = root
        self.run = run
        self.keep = keep
        self.best = best

    @abstractmethod
    def begin(self, step: int) -> Location:
        """Clear away what an earlier process left unfinished; return a new folder for the parts of a checkpoint."""

    def commit(
        self, begun: Location, step: int, parts: Iterable[Part], state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> Location:
        """Make the folder a checkpoint; returns its location.

        parts: the files that were written to it. state: JSON, the driver's own part. Raises OSError when it cannot be written, or
        when a part that was reported as written cannot be seen from here.
        """
        files = {part.name: part for part in parts}
        for part in files.values():
            _check_size(begun / part.name, part)
        text = json.dumps(dict(state), indent=1, sort_keys=True).encode()
        files[STATE] = describe_bytes(STATE, text)
        serial = 1 + max((m.serial for m in manifests(self.root)), default=0)
        return self._publish(text, Manifest(begun, step, serial, self.run, metrics, files))

    def retire(self) -> None:
        """Remove the complete checkpoints of this run that are neither among the newest, nor the best, nor the newest healthy one."""
        ours = [m for m in manifests(self.root) if m.run == self.run]
        exempt = (self.best.of(ours) if self.best else None, newest_healthy(ours))
        for manifest in ours[self.keep :]:
            if not any(manifest is one for one in exempt):
                self._remove(manifest.folder)

    @abstractmethod
    def abandon(self, begun: Location) -> None:
        """Remove the folder of a checkpoint that will not be finished, as far as possible."""

    @abstractmethod
    def _publish(self, state: bytes, manifest: Manifest) -> Location: ...

    @abstractmethod
    def _remove(self, folder: Location) -> None:
        """At no moment is half a checkpoint under a checkpoint's name."""


def open_store(root: Location, run: str, keep: int, best: Best | None = None) -> CheckpointStore:
    """Return the store for a place; creates nothing."""
    kind = RemoteStore if isinstance(root, RemotePath) else LocalStore
    return kind(root, run, keep, best)


class LocalStore(CheckpointStore):
    """Checkpoints in a file system, which machines may share: temporary name, flush, rename."""

    root: Path

    def begin(self, step: int) -> Path:
        root = self.root.absolute()  # workers have working directories of their own
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{self._unfinished}*"):
            shutil.rmtree(leftover, ignore_errors=True)  # a worker that is just being ended may still write there
        begun = root / f"{self._unfinished}step-{step:08d}-{uuid.uuid4().hex[:12]}"
        begun.mkdir()
        return begun

    @property
    def _unfinished(self) -> str:
        return f".unfinished-{self.run}-"

    def _publish(self, state: bytes, manifest: Manifest) -> Path:
        folder = Path(str(manifest.folder))
        for name, data in ((STATE, state), (MANIFEST, manifest.to_json())):
            (folder / name).write_bytes(data)
            flush(folder / name)
        flush(folder)
        final = self.root / free_name(_name(manifest.step), {p.name for p in self.root.iterdir()})
        folder.rename(final)
        flush(self.root)
        return final

    def abandon(self, begun: Location) -> None:
        shutil.rmtree(str(begun), ignore_errors=True)

    def _remove(self, folder: Location) -> None:
        assert isinstance(folder, Path)
        shutil.rmtree(folder.rename(self.root / f"{self._unfinished}{folder.name}"), ignore_errors=True)


class RemoteStore(CheckpointStore):
    """Checkpoints in an object store: parts under the final name, the manifest last."""

    root: RemotePath

    def begin(self, step: int) -> RemotePath:
        taken = self.root.children()
        for folder in taken:
            if NAME.fullmatch(folder.name) and not is_committed(folder) and self._is_ours(folder):
                self._remove(folder)
        # A name that nobody had: a worker that is just being ended may still write to the folder it knew.
        folder = self.root / free_name(_name(step), {child.name for child in taken})
        (folder / BEGUN).write_bytes(self._begun.encode())
        return folder

    @property
    def _begun(self) -> str:
        return json.dumps({"run": self.run})

    def _is_ours(self, folder: RemotePath) -> bool:
        names = {child.name for child in folder.children()}
        text = (folder / BEGUN).read_text() if BEGUN in names else ""
        if not text:
            return names <= {BEGUN}  # a process ended before it wrote anything: nobody misses an empty folder
        return text == self._begun

    def _publish(self, state: bytes, manifest: Manifest) -> RemotePath:
        folder = manifest.folder
        assert isinstance(folder, RemotePath)
        (folder / STATE).write_bytes(state)
        (folder / MANIFEST).write_bytes(manifest.to_json())
        return folder

    def abandon(self, begun: Location) -> None:
        """Left for the next `begin`: what just failed was writing to this very store."""

    def _remove(self, folder: Location) -> None:
        assert isinstance(folder, RemotePath)
        (folder / MANIFEST).unlink()
        for file in folder.children():
            if file.name != BEGUN:
                file.unlink()
        folder.remove()


def flush(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_name(name: str, taken: set[str]) -> str:
    """`name`, with a number where something has it already: a checkpoint is never replaced, so that it is always there."""
    numbered = (f"{name}.{number}" for number in itertools.count(1))
    return next(new for new in itertools.chain([name], numbered) if new not in taken)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _check_size(file: Location, part: Part) -> None:
    try:
        actual = size(file)
    except FileNotFoundError:
        actual = None
    if actual != part.bytes:
        raise OSError(
            f"{part.name} was written with {part.bytes} bytes, but here {file} "
            + ("does not exist" if actual is None else f"has {actual}")
            + "; all machines of a job must see the same storage: set checkpoint.dir to a shared folder or a URL"
        )
