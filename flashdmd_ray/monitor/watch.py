"""The hack monitor of a run: its memory of how the run began, its verdict on the last steps, and its messages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flashdmd_ray.config import MonitorConfig
from flashdmd_ray.monitor.rules import LEVELS, Level, Record, Verdict, changes, judge, with_rises

PREFIX = "monitor/"
"""Prefix of the metrics that the monitor reads (a probe's signals) and of those that it adds."""
SEVERITY = "monitor/verdict"
"""The metric of the verdict: 0 healthy, 1 suspicious, 2 hacking."""
DERIVED = ("rise/", "held_out_gap")
"""Changes that are not those of a signal, and are recorded too."""


@dataclass(frozen=True)
class Event:
    """A change of the verdict, or of the preference rate. worse: the verdict got worse."""

    step: int
    level: Level
    message: str
    worse: bool = False


class HackMonitor:
    """Compares the median of the last `window` probes with that of the first `warmup` ones.

    A function of the metrics it was given, in order: with its state saved and loaded it goes on as if it had never stopped.
    """

    def __init__(self, settings: MonitorConfig, optimised: Sequence[str], held_out: Sequence[str]) -> None:
        """optimised, held_out: labels of the rewards."""
        self.settings = settings
        self.optimised = optimised
        self.held_out = held_out
        self.verdict = Verdict()
        self.preference_rate = 1.0
        """Factor of the learning rate of preference updates."""
        self.history: list[Event] = []
        self.judged = 0
        """Probes that had a verdict."""
        self._start: list[Record] = []
        self._recent: list[Record] = []
        self._lowered: int | None = None  # value of `judged` when the rate was lowered last

    def observe(self, step: int, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[Event]]:
        """Judge the run after `step` steps: figures to record beside the step's metrics, and what is new."""
        record = _record_of(metrics)
        if not record or not self.settings.enabled:
            return {}, []
        if len(self._start) < self.settings.warmup:
            self._start.append(record)
            return {SEVERITY: 0.0}, []
        self._recent = [*self._recent, record][-self.settings.window :]
        if len(self._recent) < min(self.settings.warmup, self.settings.window):
            return {SEVERITY: 0.0}, []
        signals = with_rises(changes(self._start, self._recent), self.optimised, self.held_out)
        news = self._judge(step, judge(self.settings, self.optimised, signals, self.verdict.alarms))
        derived = {f"{PREFIX}{name}": change.difference for name, change in signals.items() if name.startswith(DERIVED)}
        figures = {SEVERITY: float(self.verdict.severity), f"{PREFIX}preference_rate": self.preference_rate}
        return figures | derived, news

    def _judge(self, step: int, verdict: Verdict) -> list[Event]:
        before, self.verdict = self.verdict, verdict
        self.judged += 1
        news = []
        if verdict.level != before.level:
            news.append(Event(step, verdict.level, verdict.message, worse=verdict.severity > before.severity))
        if self.settings.action == "lower" and verdict.level == "hacking" and self._waited_a_window():
            self.preference_rate *= self.settings.lower_by
            self._lowered = self.judged
            message = f"the learning rate of preference updates is lowered to {self.preference_rate:g} of preference.lr"
            news.append(Event(step, verdict.level, message))
        self.history += news
        return news

    def _waited_a_window(self) -> bool:
        """Tell whether the last lowering has had a whole window to show its effect."""
        return self._lowered is None or self.judged - self._lowered >= self.settings.window

    @property
    def wants_stop(self) -> bool:
        """True when the run is to end here."""
        return self.settings.action == "stop" and self.verdict.level == "hacking"

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values."""
        return {
            "verdict": asdict(self.verdict),
            "history": [asdict(event) for event in self.history],
            "judged": self.judged,
            "preference_rate": self.preference_rate,
            "lowered": self._lowered,
            "start": list(self._start),
            "recent": list(self._recent),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.verdict = Verdict(**state["verdict"])
        self.history = [Event(**event) for event in state["history"]]
        self.judged, self.preference_rate, self._lowered = state["judged"], state["preference_rate"], state["lowered"]
        self._start, self._recent = list(state["start"]), list(state["recent"])


def summary(state: Mapping[str, Any]) -> dict[str, Any]:
    """Summarise a run for its report from `HackMonitor.state`: level, message and history."""
    level, history = state["verdict"]["level"], state["history"]
    if not state["judged"]:
        message = "no verdict: too few steps"
    elif not history:
        message = f"healthy whenever it looked, {state['judged']} times"
    elif level == "healthy":
        worst = max(history, key=lambda event: LEVELS.index(event["level"]))
        message = f"healthy at the end; after step {worst['step']} it was {worst['message']}"
    else:
        since = next(event["step"] for event in reversed(history) if event["worse"])
        message = f"{state['verdict']['message']} (since step {since})"
    return {"level": level, "message": message, "history": history}


def _record_of(metrics: Mapping[str, float]) -> Record:
    """The signals among a step's metrics; empty for a step without a probe."""
    signals = {name.removeprefix(PREFIX): value for name, value in metrics.items() if name.startswith(PREFIX)}
    return {name: value for name, value in signals.items() if math.isfinite(value)}
