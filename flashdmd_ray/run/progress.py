"""Progress that fits where it is read: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from flashdmd_ray.run.output import write_directly

SHORTEST_S, LONGEST_S = 5.0, 60.0
"""Between two plain lines: at most one in 5 s, at least one a minute (once a step has ended), else one every LINE_SHARE of the run."""
LINE_SHARE = 0.05
QUIET_S = 10.0
"""Longest silence while something takes long."""
SMOOTHING = 0.1
"""Weight of the newest step in the running seconds per step, once there are ten of them."""


class Pace:
    """Seconds per step and what is left, from the steps of this process; steps done before a resume do not count."""

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done = done
        self.seconds_per_step: float | None = None
        self._counted = 0
        self._last = monotonic()

    def step(self, step: int) -> None:
        """`step` steps are done now."""
        now = monotonic()
        advanced = step - self.done
        if advanced > 0:
            seconds = (now - self._last) / advanced
            # The first interval holds loading and warm-up: it is shown for want of a better one, and then forgotten.
            share = 1.0 if self._counted == 0 else max(1 / self._counted, SMOOTHING)
            self.seconds_per_step = (1 - share) * (self.seconds_per_step or 0.0) + share * seconds
            self._counted += 1
        self.done, self._last = step, now

    def pause(self) -> None:
        """Time up to now was not spent on steps (models were loaded, say)."""
        self._last = monotonic()

    @property
    def eta(self) -> str:
        if self.seconds_per_step is None:
            return "-:--"
        return clock(self.seconds_per_step * (self.total - self.done))

    @property
    def speed(self) -> str:
        return "- s/step" if self.seconds_per_step is None else f"{self.seconds_per_step:.2f} s/step"


class PlainProgress:
    """Lines `step  20/200  10 %  1.31 s/step  ETA 3:56  score 0.31`: first and last step, and every 5 % in between."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self._pace = Pace(total, done)
        self._stream = stream
        self._start = self._shown_at = monotonic()
        self._shown_step = -total  # the first step is always due

    def say(self, text: str) -> None:
        """One line about something else than a step, with the time since the start."""
        self._print(f"{clock(monotonic() - self._start):>6}  {text}")
        self._pace.pause()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are the few figures worth a glance."""
        self._pace.step(step)
        now, total = monotonic(), self._pace.total
        waited = now - self._shown_at
        due = self._shown_step < 0 or step >= total or waited >= LONGEST_S
        if due or (waited >= SHORTEST_S and step - self._shown_step >= LINE_SHARE * total):
            counter = f"step {step:>{len(str(total))}}/{total}  {100 * step // total:>3} %"
            self._print("  ".join([counter, self._pace.speed, f"ETA {self._pace.eta}", *figures(metrics)]))
            self._shown_at, self._shown_step = now, step

    def notice(self, text: str) -> None:
        write_directly(text)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar and the latest figures on the last two lines of a terminal; everything else is printed above them."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self._pace = Pace(total, done)
        self._start = monotonic()
        self._console = Console(file=stream, highlight=False)
        self._bar = RichProgress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %  {task.fields[pace]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total, completed=done, pace="")
        self._figures = Text("", style="dim", no_wrap=True, overflow="ellipsis")
        self._notice = Text("", style="bold")
        self._live = Live(get_renderable=lambda: self._lines(), console=self._console, refresh_per_second=4)
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(Text.assemble((f"{clock(monotonic() - self._start):>6}  ", "dim"), text))
        self._pace.pause()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.step(step)
        self._bar.update(self._task, completed=step, pace=f"{self._pace.speed}  ETA {self._pace.eta}")
        self._figures.plain = "  ".join(figures(metrics))

    def notice(self, text: str) -> None:
        self._notice.plain = text  # drawn by the display's own thread a moment later

    def close(self) -> None:
        self._live.stop()

    def _lines(self) -> Group:
        return Group(self._bar, *(line for line in (self._figures, self._notice) if line))


class Progress:
    """Context manager that chooses the display: a bar when the stream is a terminal, else lines."""

    def __init__(self, total: int, done: int = 0, stream: TextIO | None = None) -> None:
        stream = stream or sys.stdout
        kind = BarProgress if stream.isatty() else PlainProgress
        self._display: BarProgress | PlainProgress = kind(total, done, stream)

    def say(self, text: str) -> None:
        self._display.say(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._display.step(step, metrics)

    def notice(self, text: str) -> None:
        """Show a short text that stays; may be called inside a signal handler."""
        self._display.notice(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.close()


@contextmanager
def still(say: Callable[[str], None], text: Callable[[], str]) -> Iterator[None]:
    """Say `text()` every QUIET_S seconds until the block ends, so that nobody takes a slow program for a dead one."""
    ended = Event()

    def speak() -> None:
        while not ended.wait(QUIET_S):
            say(text())

    speaker = Thread(target=speak, daemon=True, name="flashdmd-still")
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def figures(metrics: Mapping[str, float]) -> list[str]:
    return [f"{name} {float(value):.3g}" for name, value in metrics.items()]


def clock(seconds: float) -> str:
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
