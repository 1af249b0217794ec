"""Ctrl-C, SIGTERM and the signals of terminals and batch systems become a question that the training loop asks at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from flashdmd_ray.run.output import write_directly

INSISTENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of somebody who may send a second one because the first takes too long."""
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""A closed terminal, and batch systems shortly before their time limit. They may come several times; that means no hurry."""


class Interruption:
    """Context manager, main thread only.

    The first signal of INSISTENT and NOTICES sets `requested`; the loop finishes its step, writes a checkpoint and leaves with
    `exit_code` (128 and the signal's number). A second SIGINT or SIGTERM does not wait: it raises KeyboardInterrupt or SystemExit(143)
    where the program is, so that cleanup still runs; a third one ends the process the default way. NOTICES that were ignored when the
    program started (nohup) stay ignored. `notify` gets a short text at the first signal; it is called inside the signal handler, so it
    must not print through a buffer that may just be in use. grace_s: after a first signal of INSISTENT, how long step and checkpoint may
    take; then the program is left as by a second one. None: as long as they need.
    """

    def __init__(self, notify: Callable[[str], None] | None = None, grace_s: float | None = None) -> None:
        self._notify = notify or write_directly
        self._grace_s = grace_s
        self._received: signal.Signals | None = None
        self._insisted = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """0 without a signal, else 128 + its number, as shells report it."""
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        if self._grace_s is not None:
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._insisted and self._grace_s is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in INSISTENT:
            if self._insisted:
                for each in INSISTENT:
                    signal.signal(each, signal.SIG_DFL)
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            self._insisted = True
            if self._grace_s is not None:
                signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        if self._received is None:
            self._received = signal.Signals(number)
            again = " (Ctrl-C again stops at once)" if number == signal.SIGINT else ""
            within = f" within {self._grace_s:g} s" if self._grace_s and number in INSISTENT else ""
            self._notify(f"{self._received.name}: finishing this step, then writing a checkpoint{within}{again}")

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._notify(f"not done within {self._grace_s:g} s (deadlines.stop_s): the step is abandoned")
        raise SystemExit(self.exit_code)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a job to stop: INSISTENT, and those of NOTICES that neither nohup nor somebody else has taken."""
    return (*INSISTENT, *(n for n in NOTICES if signal.getsignal(n) in (signal.SIG_DFL, _leave)))


def leave_on_signals() -> None:
    """End this process in order, by SystemExit, on a signal that asks it to stop; Ctrl-C keeps raising KeyboardInterrupt."""
    for number in stop_signals():
        if number != signal.SIGINT:
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    for each in NOTICES:
        if signal.getsignal(each) is _leave:
            signal.signal(each, signal.SIG_IGN)  # so that cleanup is not interrupted by the same notice again
    raise SystemExit(128 + number)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started inside never get NOTICES, nor SIGTERM.

    Terminals, `timeout` and batch systems send them to all processes of a job, but only the main one may decide when its helpers end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*NOTICES, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
