"""Copies of what is served, so that files never change under a loaded model and the last good version outlives its source.

Below the cache folder: one folder for each name and source, in it one for each version, named by its content, and `<version>.json`, the
signature that the source had, and whether the version was ever served. Replicas on one machine share it. Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flashdmd_ray.run.files import unfinished_folder, write_atomically
from flashdmd_ray.serving.sources import Source

KEPT = 2
"""Versions that were served and stay on the disk."""


@dataclass(frozen=True)
class Snapshot:
    """One version's own copy. signature: of its source, when it was made."""

    folder: Path
    signature: str

    @property
    def version(self) -> str:
        return self.folder.name


class SnapshotStore:
    """The copies of one model."""

    def __init__(self, cache: Path | None, name: str, source: str) -> None:
        root = default_cache() if cache is None else cache
        self._root = root / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        self._source = source

    def in_words_of_the_source(self, message: str) -> str:
        """The message with the source's name, which the user gave, wherever it names the copy."""
        return re.sub(re.escape(str(self._root)) + r"/[^/\s:']+", lambda _: self._source, message)

    def take(self, source: Source, patience_s: float) -> Snapshot:
        """The source's version now, copied unless it was. Raises ValueError when it cannot be had whole."""
        signature = source.signature()
        with self._locked(patience_s):
            for snapshot in self._known():
                if snapshot.signature == signature:
                    return snapshot
            return self._copy(source, signature, patience_s)

    def last_good(self) -> Snapshot | None:
        """The version that was served last, whatever its source says now."""
        good = [(facts["served"], snapshot) for snapshot, facts in self._facts() if facts.get("served")]
        return max(good, key=lambda pair: pair[0])[1] if good else None

    def mark_good(self, snapshot: Snapshot, patience_s: float) -> None:
        """It is being served: remember, and forget what is older than the newest KEPT."""
        with self._locked(patience_s):
            served = 1 + max((facts.get("served", 0) for _, facts in self._facts()), default=0)
            self._write(snapshot.folder, {"signature": snapshot.signature, "served": served})
            ranked = sorted(self._facts(), key=lambda pair: pair[1].get("served", 0), reverse=True)
            for old, _ in ranked[KEPT:]:
                self._facts_file(old.folder).unlink(missing_ok=True)
                shutil.rmtree(old.folder, ignore_errors=True)

    def _copy(self, source: Source, signature: str, patience_s: float) -> Snapshot:
        with unfinished_folder(self._root / "copy") as unfinished:
            source.fetch(unfinished, patience_s)
            if source.signature() != signature:
                raise ValueError("the source changed while it was copied; it is looked at again")
            folder = self._root / fingerprint(unfinished)
            if not folder.is_dir():  # else the same content again, touched
                unfinished.rename(folder)
        known = self._read(folder)
        self._write(folder, {**known, "signature": signature})
        return Snapshot(folder, signature)

    def _known(self) -> list[Snapshot]:
        return [snapshot for snapshot, _ in self._facts()]

    def _facts(self) -> list[tuple[Snapshot, dict[str, Any]]]:
        """Every complete copy, with what is written about it."""
        found = []
        for folder in sorted(self._root.iterdir()) if self._root.is_dir() else []:
            if folder.is_dir() and (facts := self._read(folder)):
                found.append((Snapshot(folder, str(facts["signature"])), facts))
        return found

    def _read(self, folder: Path) -> dict[str, Any]:
        try:
            facts = json.loads(self._facts_file(folder).read_text(encoding="utf-8"))
            return facts if "signature" in facts else {}
        except (OSError, ValueError, TypeError):
            return {}

    def _write(self, folder: Path, facts: dict[str, Any]) -> None:
        write_atomically(self._facts_file(folder), json.dumps(facts))

    def _facts_file(self, folder: Path) -> Path:
        return self._root / f"{folder.name}.json"

    @contextmanager
    def _locked(self, patience_s: float) -> Iterator[None]:
        """Alone among the replicas of this machine. The kernel ends the lock of a holder that dies."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        give_up = time.monotonic() + patience_s
        with (self._root / ".lock").open("w") as lock:
            while not _try_lock(lock):
                if time.monotonic() > give_up:
                    raise ValueError(f"{self._root} was locked by another replica for {patience_s:g} s")
                time.sleep(0.1)
            yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def default_cache() -> Path:
    """Of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashdmd_ray" / "serving"


def fingerprint(folder: Path) -> str:
    """Twelve digits that tell versions apart: of every file's name and content."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]
