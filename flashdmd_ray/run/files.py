"""Files and folders that appear whole or not at all. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file in one rename, so that a reader or a crash sees the old content or the new one. Text is stored as UTF-8."""
    with new_file(path) as unfinished:
        unfinished.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of an empty file beside `path`, which replaces `path` in one rename when the block ends without an error.

    Several processes may write the same `path` at once: one of their files stays, whole. The umask decides the permissions, whatever
    wrote the file. After an error, what stood at `path` is as it was.
    """
    unfinished = _unused_name(path)
    unfinished.touch(exist_ok=False)
    try:
        mode = unfinished.stat().st_mode & 0o777
        yield unfinished
        unfinished.chmod(mode)  # some libraries create files that only their owner can read
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, with a hidden name; it is removed in the end, unless the block has renamed it.

    Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unused_name(path)
    unfinished.mkdir()
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes that name when the block ends without an error.

    A folder that stood there is removed then; after an error it is as it was. The umask decides the permissions of its files.
    """
    with unfinished_folder(path) as unfinished:
        yield unfinished
        readable = new_mode(unfinished)
        for file in unfinished.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(readable | file.stat().st_mode & 0o111)
        if not path.exists():
            unfinished.rename(path)
            return
        with unfinished_folder(path) as old:
            path.rename(old)
            unfinished.rename(path)


def new_mode(folder: Path) -> int:
    """Permissions that the umask gives a new file in `folder`; safetensors creates files that only their owner can read."""
    probe = _unused_name(folder / "mode")
    probe.touch(exist_ok=False)
    try:
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink()


def check_writable(path: Path) -> None:
    """Make and remove a folder in the nearest existing folder of `path`: missing permissions, read-only mounts and plain files show up.

    Raises OSError with that folder as its `filename`.
    """
    nearest = path
    try:
        while not nearest.exists():
            nearest = nearest.parent
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=nearest))
    except OSError as error:
        raise OSError(error.errno, error.strerror or type(error).__name__, str(nearest)) from None


def user_cache(name: str) -> Path:
    """Folder of this user for files that can be made again. Raises ValueError for a user without a home, as in some containers."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise ValueError(
            f"no folder to cache {name}: this user has no home; set XDG_CACHE_HOME to a folder it can write"
        )
    return Path(base) / "flashdmd_ray" / name


def _unused_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
