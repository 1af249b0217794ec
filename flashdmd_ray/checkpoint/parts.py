"""Files of one role in a checkpoint: tensors are taken by the training thread and written by another thread of its process."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from flashdmd_ray.checkpoint.manifest import Part, describe
from flashdmd_ray.checkpoint.store import flush
from flashdmd_ray.checkpoint.tensors import save_tensors
from flashdmd_ray.run.messages import typed_line
from flashdmd_ray.run.storage import Location, RemotePath


@dataclass(frozen=True)
class Destination:
    """Folder that roles save to, used like a path: `directory / name`.

    background: write in another thread, after `save` has returned.
    """

    path: Location
    background: bool

    def __truediv__(self, name: str) -> PartFile:
        assert "/" not in name, "a checkpoint is one folder"
        return PartFile(self, name)


@dataclass(frozen=True)
class PartFile:
    """A file of a checkpoint that is to be written."""

    directory: Destination
    name: str


@dataclass(frozen=True)
class PartReport:
    """Progress of one part: written when `part` is there, failed when `error` is, still being written otherwise."""

    name: str
    part: Part | None = None
    error: str | None = None

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> PartReport:
        fields = json.loads(text)
        return cls(fields["name"], fields["part"] and Part(**fields["part"]), fields["error"])


class Saved:
    """Base of roles that save parts."""

    def saved(self, directory: Destination) -> tuple[str, ...]:
        """Report, as text, on each part that this process was given for `directory`: a `PartReport`. Does not wait and does not raise."""
        return tuple(report.to_text() for report in _writer.reports(directory))


def save_part(file: PartFile, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, in the background if the destination says so; `Saved.saved` tells how it went.

    Tensors on a device are copied to the host before this returns. Those on the host already must be copies or never change again:
    to copy what is a copy would double the memory.
    """
    _writer.write(file, {name: tensor.detach().to("cpu") for name, tensor in tensors.items()})


class PartWriter:
    """Writer of a process's parts, one after the other. Keeps the reports on those of the latest destination."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[PartFile, PartReport] = {}
        self._waiting: queue.SimpleQueue[tuple[PartFile, dict[str, Tensor]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, file: PartFile, tensors: dict[str, Tensor]) -> None:
        with self._lock:
            self._reports = {f: report for f, report in self._reports.items() if f.directory == file.directory}
            self._reports[file] = PartReport(file.name)
        if not file.directory.background:
            self._finish(file, tensors)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoint-parts")
            self._thread.start()
        self._waiting.put((file, tensors))

    def reports(self, directory: Destination) -> list[PartReport]:
        with self._lock:
            return [report for file, report in self._reports.items() if file.directory == directory]

    def _work(self) -> None:
        while True:
            self._finish(*self._waiting.get())

    def _finish(self, file: PartFile, tensors: dict[str, Tensor]) -> None:
        try:
            report = PartReport(file.name, part=write_part(file.directory.path / file.name, tensors))
        except Exception as error:  # whatever it is, the driver must hear of it
            report = PartReport(file.name, error=typed_line(error))
        tensors.clear()  # free the copies before the next part is waited for
        with self._lock:
            if file in self._reports:
                self._reports[file] = report


_writer = PartWriter()


def write_part(path: Location, tensors: Mapping[str, Tensor]) -> Part:
    """Write one file, flushed to the disk or uploaded to the store. Raises OSError, or what the store's driver raises."""
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="flashdmd-") as folder:
            local = Path(folder) / path.name
            save_tensors(local, tensors)
            part = describe(path.name, local)
            path.upload(local)
            return part
    save_tensors(path, tensors)
    flush(path)
    return describe(path.name, path)
