"""Standard output and standard error that outlive their readers: nobody who looks at a job decides about it. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors of a reader that will not come back: a pipe's end, a terminal that was closed."""


class _Output(io.FileIO):
    """A file descriptor to write to. What cannot be written is dropped; once the reader is gone, everything is."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:  # a full disk may have room again for the next line
            if error.errno in _GONE:
                _to_nowhere(self.fileno())
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From now on, no write to standard output or error raises: not when a pipe breaks, a terminal closes or cannot show a letter.

    Both then lead nowhere for all that write to the descriptors, C libraries and later child processes too. Streams that were replaced
    before, by a test for example, are left alone.
    """
    # A descriptor that was closed at the start would be given to the next file opened.
    if sys.stdin is None:
        _to_nowhere(0)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            _to_nowhere(descriptor)
        elif stream is not getattr(sys, f"__{name}__"):
            continue
        else:
            stream.flush()
        setattr(sys, name, _over(descriptor, stream))


def private_output() -> TextIO:
    """Standard output as it was until now, for messages of this program alone. What libraries print goes to standard error from now on."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return _over(kept, None)


def write_directly(text: str) -> None:
    """Write a line to standard error past Python's buffers: allowed in a signal handler. A reader that is gone is ignored."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _over(descriptor: int, stream: TextIO | None) -> TextIO:
    raw = _Output(descriptor, "wb", closefd=False)
    encoding = "utf-8" if stream is None else stream.encoding
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=raw.isatty() or descriptor == 2
    )


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
