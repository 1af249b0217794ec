"""Places for checkpoints: a folder, or any store that fsspec has a driver for. Imports no torch."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from flashdmd_ray.config import Config, suggestion
from flashdmd_ray.run.files import check_writable
from flashdmd_ray.run.messages import one_line

WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"}
"""Object stores: a folder is the common beginning of names. To make one would try to make the bucket."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a store, with the few methods of `Path` that checkpoints need. Nothing is answered from a cache.

    Raises what the driver raises: OSError for most, with exceptions of their own for some.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        store, path = self._open()
        return bool(store.exists(path))

    def size(self) -> int:
        """Bytes of a file. Raises FileNotFoundError when there is none."""
        store, path = self._open()
        return int(store.info(path)["size"])

    def children(self) -> list[RemotePath]:
        """Files and folders directly in this folder, by name; none when there is no such folder."""
        store, path = self._open()
        try:
            entries = store.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in entries}
        return [self / name for name in sorted(names) if name]

    def read_bytes(self) -> bytes:
        store, path = self._open()
        return bytes(store.cat_file(path))

    def read_text(self) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes) -> None:
        """One object, complete or absent where the store promises that."""
        store, path = self._open_for_writing()
        store.pipe_file(path, data)

    def upload(self, file: Path) -> None:
        store, path = self._open_for_writing()
        store.put_file(str(file), path)

    def download(self, file: IO[bytes]) -> None:
        """The whole content, in pieces, at the end of `file`."""
        store, path = self._open()
        with store.open(path, "rb") as source:
            shutil.copyfileobj(source, file, 16 * 2**20)

    def unlink(self) -> None:
        """Remove a file; nothing happens when there is none."""
        store, path = self._open()
        if store.exists(path):
            store.rm_file(path)

    def remove(self) -> None:
        """Remove a folder with everything in it; nothing happens when there is none."""
        store, path = self._open()
        if store.exists(path):
            store.rm(path, recursive=True)

    def _open(self) -> tuple[Any, str]:
        store, path = fsspec.core.url_to_fs(self.url)
        store.invalidate_cache()  # other processes write here
        return store, path

    def _open_for_writing(self) -> tuple[Any, str]:
        if _protocol(self.url) not in WITHOUT_FOLDERS:
            store, folder = self.parent._open()
            store.makedirs(folder, exist_ok=True)
        return self._open()


Location = Path | RemotePath


def parse_location(text: str) -> Location:
    """A path, a file:// URL or another URL. Raises ValueError, without the key, when it cannot be used here."""
    if "://" not in text:
        return Path(text)
    if "::" in text:
        raise ValueError(f"{text}: chained URLs cannot tell when a file has arrived; give the store's own URL")
    protocol = _protocol(text)
    try:
        driver = fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise ValueError(
            f"{text}: fsspec knows no protocol '{protocol}'{suggestion(protocol, list(known_implementations))}; "
            "use a path or a URL such as s3://bucket/folder"
        ) from None
    except ImportError as error:
        raise ValueError(
            f"{text}: the driver of {protocol}:// is not installed ({error}); {_how_to_install(protocol)}"
        ) from None
    if issubclass(driver, LocalFileSystem):
        return Path(LocalFileSystem._strip_protocol(text))
    return RemotePath(text.rstrip("/"))


def _protocol(url: str) -> str:
    return url.partition("://")[0]


def _how_to_install(protocol: str) -> str:
    package = str(known_implementations[protocol]["class"]).partition(".")[0]
    return "install what it names" if package == "fsspec" else f"pip install {package}"


def checkpoint_root(config: Config, run: Path) -> Location:
    """Place of the checkpoints of the run in folder `run`: in it, or under its name in `checkpoint.dir`."""
    if config.checkpoint.dir is None:
        return run / "checkpoints"
    try:
        return parse_location(config.checkpoint.dir) / config.run.name
    except ValueError as error:
        raise ValueError(f"checkpoint.dir: {error}") from None


def check_checkpoint_root(config: Config, run: Path) -> Location:
    """`checkpoint_root` after a trial: something was written there and removed again. Raises ValueError when that fails."""
    root = checkpoint_root(config, run)
    if config.checkpoint.dir is None:
        return root
    if isinstance(root, RemotePath) and _protocol(root.url) == "memory" and config.runtime == "ray":
        raise ValueError("checkpoint.dir: memory:// is seen by one process only; use a store, or set runtime to local")
    try:
        _try_to_write(root)
    except Exception as error:  # drivers raise exceptions of their own
        raise ValueError(
            f"checkpoint.dir: cannot write {root} ({one_line(error)}); correct it, or give this user access"
        ) from None
    return root


def _try_to_write(root: Location) -> None:
    if isinstance(root, RemotePath):
        trial = root / f".writable-{uuid.uuid4().hex}"
        trial.write_bytes(b"")
        trial.unlink()
        return
    check_writable(root)


def children(folder: Location) -> Sequence[Location]:
    """Files and folders directly in a folder, by name; none when there is no such folder."""
    if isinstance(folder, RemotePath):
        return folder.children()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def size(file: Location) -> int:
    """Bytes of a file. Raises FileNotFoundError when there is none."""
    return file.size() if isinstance(file, RemotePath) else file.stat().st_size
