"""One job at a time on a run folder and on its checkpoints.

In a file system the kernel holds the lock, and ends it with the process however that ends. A store that knows no locks gets a lease: a
file that its holder renews, and that counts as left behind when it stays the same for LEASE_S.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.messages import typed_line
from flashdmd_ray.run.storage import Location

log = logging.getLogger(__name__)

LOCK = "lock.json"
LEASE_S = 30.0
"""A lease that was not renewed for so long is dead."""
RENEW_S = 8.0
SETTLE_S = 1.0
"""Pause before a lease just written is read again: of two that start together, the last writer has it."""


@dataclass(frozen=True)
class Holder:
    """The job that holds a folder. beat: how often it renewed its lease."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    since: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0

    @property
    def is_gone(self) -> bool:
        """True for a process of this machine that is not there any more."""
        return self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists()


class Lock:
    """A folder held by this job. `check` raises RuntimeError when another job has taken it over meanwhile."""

    def check(self) -> None:
        """The kernel takes a lock from nobody."""


@contextmanager
def hold(folder: Location) -> Iterator[Lock]:
    """Hold a folder alone until the block ends. Raises ValueError, naming the job that holds it."""
    if isinstance(folder, Path):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _refusal(folder, _read(folder / LOCK)) from None
            except OSError:  # a file system without locks
                pass
            else:
                file.truncate(0)
                file.write(json.dumps(asdict(Holder())) + "\n")
                file.flush()
                yield Lock()
                file.truncate(0)
                return
    lease = _Lease(folder)
    lease.take()
    try:
        yield lease
    finally:
        lease.give_back()


def check_free(folder: Path) -> None:
    """Raise ValueError when the kernel holds this folder for another job; leaves no trace."""
    with suppress(FileNotFoundError), (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(folder, _read(folder / LOCK)) from None
        except OSError:  # a file system without locks: the job finds out
            pass


@contextmanager
def hold_run(folder: Path, checkpoints: Location) -> Iterator[Lock]:
    """Hold a run folder, and the place of its checkpoints where that is another one. Raises ValueError like `hold`."""
    with ExitStack() as ends:
        locks = [ends.enter_context(hold(folder))]
        if not (isinstance(checkpoints, Path) and checkpoints.is_relative_to(folder)):
            locks.append(ends.enter_context(hold(checkpoints)))
        yield _Locks(locks)


class _Locks(Lock):
    def __init__(self, locks: Sequence[Lock]) -> None:
        self._locks = locks

    def check(self) -> None:
        for lock in self._locks:
            lock.check()


class _Lease(Lock):
    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._file = folder / LOCK
        self._holder = Holder()
        self._usurper: Holder | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Write the lease, after any other one has shown that nobody renews it."""
        other = _read(self._file)
        given_up = time.monotonic() + LEASE_S
        if other is not None and not other.is_gone:
            log.warning("%s; waiting up to %g s to see whether it is alive", _words(self._folder, other), LEASE_S)
        while other is not None and not other.is_gone and time.monotonic() < given_up:
            time.sleep(min(1.0, LEASE_S / 10))
            seen = _read(self._file)
            if seen is not None and seen != other:
                raise _refusal(self._folder, seen)
            other = seen
        _write(self._file, self._holder)
        time.sleep(SETTLE_S)
        seen = _read(self._file)
        if seen is not None and seen.token != self._holder.token:
            raise _refusal(self._folder, seen)
        self._thread.start()

    def check(self) -> None:
        if self._usurper is not None:
            raise RuntimeError(f"{_words(self._folder, self._usurper)} and took it over while this one did not answer")

    def give_back(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(Exception):  # a store that is away: the lease dies by itself
            seen = _read(self._file)
            if seen is not None and seen.token == self._holder.token:
                self._file.unlink()

    def _renew(self) -> None:
        warned = False
        while not self._ended.wait(RENEW_S):
            try:
                seen = _read(self._file)
                if seen is not None and seen.token != self._holder.token:
                    self._usurper = seen
                    return
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                _write(self._file, self._holder)
                warned = False
            except Exception as error:  # drivers of stores raise exceptions of their own
                if not warned:
                    log.warning("%s cannot be renewed (%s)", self._file, typed_line(error))
                warned = True


def _read(file: Location) -> Holder | None:
    """The holder that a lock file names; None when it names none."""
    try:
        return Holder(**json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(file: Location, holder: Holder) -> None:
    text = json.dumps(asdict(holder)) + "\n"
    if isinstance(file, Path):
        write_atomically(file, text)
    else:
        file.write_bytes(text.encode())


def _refusal(folder: Location, holder: Holder | None) -> ValueError:
    return ValueError(f"run.name: {_words(folder, holder)}; wait until it ends, stop it, or choose another run.name")


def _words(folder: Location, holder: Holder | None) -> str:
    who = "" if holder is None else f" (host {holder.host}, process {holder.pid}, since {holder.since})"
    return f"another job{who} works on {folder}"
