"""Ctrl-C and SIGTERM become a question that the training loop asks at the end of a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Context manager, main thread only.

    The first SIGINT or SIGTERM sets `requested`; the loop finishes its step, writes a checkpoint and leaves with `exit_code`
    (130 or 143). A second signal does not wait: it raises KeyboardInterrupt (SIGINT) or SystemExit(143) (SIGTERM) where the program is,
    so that cleanup still runs; a third one ends the process the default way. `notify` gets a short text at the first signal; it is called
    inside the signal handler, so it must not print through a buffer that may just be in use.
    """

    def __init__(self, notify: Callable[[str], None] | None = None) -> None:
        self._notify = notify or write_directly
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """0 without a signal, else 128 + its number, as shells report it."""
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self._received = signal.Signals(number)
        again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
        self._notify(f"{self._received.name}: finishing this step, then writing a checkpoint{again}")


def write_directly(text: str) -> None:
    """Straight to the standard error's file descriptor, past Python's buffers."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
