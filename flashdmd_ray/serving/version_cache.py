"""Copies of served versions: files never change under a loaded model, and the last good version outlives its source.

Below the cache folder there is one folder for each name and source. It holds one folder for each version, named by its content, and
beside it `<version>.json`: the signature that the source had, and when the version was last served. Replicas on one machine share the
cache. Imports no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flashdmd_ray.run.files import unfinished_folder, user_cache, write_atomically
from flashdmd_ray.serving.model_sources import ModelSource

RETAINED = 2
"""Served versions that stay on the disk."""


@dataclass(frozen=True)
class CachedVersion:
    """The copy of one version. signature: of its source, when it was made."""

    folder: Path
    signature: str

    @property
    def version(self) -> str:
        return self.folder.name


class VersionCache:
    """The copies of one model."""

    def __init__(self, cache: Path | None, name: str, source: str) -> None:
        root = user_cache("serving") if cache is None else cache
        self._root = root / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
        self._source = source

    def name_source(self, message: str) -> str:
        """Replace paths of copies in a message by the source, which is what the user wrote."""
        return re.sub(re.escape(str(self._root)) + r"/[^/\s:']+", lambda _: self._source, message)

    def fetch(self, source: ModelSource, timeout_s: float) -> CachedVersion:
        """Return the source's version now, copying it unless it was. Raises ValueError when it cannot be had whole."""
        signature = source.signature()
        with self._locked(timeout_s):
            for cached, _ in self._records():
                if cached.signature == signature:
                    return cached
            return self._copy(source, signature, timeout_s)

    def last_served(self) -> CachedVersion | None:
        """Return the version that was served last, whatever its source says now."""
        served = [(record["served"], cached) for cached, record in self._records() if record.get("served")]
        return max(served, key=lambda pair: pair[0])[1] if served else None

    def mark_served(self, cached: CachedVersion, timeout_s: float) -> None:
        """Record that a version is served, and remove all but the RETAINED newest served ones."""
        with self._locked(timeout_s):
            served = 1 + max((record.get("served", 0) for _, record in self._records()), default=0)
            self._write(cached.folder, {"signature": cached.signature, "served": served})
            ranked = sorted(self._records(), key=lambda pair: pair[1].get("served", 0), reverse=True)
            for old, _ in ranked[RETAINED:]:
                self._record_file(old.folder).unlink(missing_ok=True)
                shutil.rmtree(old.folder, ignore_errors=True)

    def _copy(self, source: ModelSource, signature: str, timeout_s: float) -> CachedVersion:
        with unfinished_folder(self._root / "copy") as unfinished:
            source.fetch(unfinished, timeout_s)
            if source.signature() != signature:
                raise ValueError("the source changed while it was copied; it is looked at again")
            folder = self._root / fingerprint(unfinished)
            if not folder.is_dir():  # else the same content again, touched
                unfinished.rename(folder)
        self._write(folder, {**self._read(folder), "signature": signature})
        return CachedVersion(folder, signature)

    def _records(self) -> list[tuple[CachedVersion, dict[str, Any]]]:
        """List every complete copy with its record."""
        records = []
        for folder in sorted(self._root.iterdir()) if self._root.is_dir() else []:
            if folder.is_dir() and (record := self._read(folder)):
                records.append((CachedVersion(folder, str(record["signature"])), record))
        return records

    def _read(self, folder: Path) -> dict[str, Any]:
        try:
            record = json.loads(self._record_file(folder).read_text(encoding="utf-8"))
            return record if "signature" in record else {}
        except (OSError, ValueError, TypeError):
            return {}

    def _write(self, folder: Path, record: dict[str, Any]) -> None:
        write_atomically(self._record_file(folder), json.dumps(record))

    def _record_file(self, folder: Path) -> Path:
        return self._root / f"{folder.name}.json"

    @contextmanager
    def _locked(self, timeout_s: float) -> Iterator[None]:
        """Exclude the other replicas of this machine. The kernel ends the lock of a holder that dies."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        deadline = time.monotonic() + timeout_s
        with (self._root / ".lock").open("w") as lock:
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise ValueError(f"{self._root} was locked by another replica for {timeout_s:g} s")
                time.sleep(0.1)
            yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def fingerprint(folder: Path) -> str:
    """Return twelve hexadecimal digits of a hash over every file's name and content."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]
