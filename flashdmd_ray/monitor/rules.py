"""The rules that tell reward hacking from training: alarms on signals that changed since the run's start, and a verdict.

Neither half of the evidence is enough alone. A reward that rises is what training is for. Images that lose edges may belong to a run whose
reward stands still. Only together they say that the reward was raised by what the images lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Literal

from flashdmd_ray.config import MonitorConfig

Level = Literal["healthy", "suspicious", "hacking"]
LEVELS: tuple[Level, ...] = ("healthy", "suspicious", "hacking")
Record = Mapping[str, float]
"""The signals of one step by name; one that could not be measured is absent."""

RELEASE = 0.8
"""An active alarm is cleared when its change falls below this part of its limit: a verdict must not flicker."""


@dataclass(frozen=True)
class Alarm:
    """A change of one signal that speaks for hacking.

    signal: its name in records and of its limit in `monitor.limits`. direction: of the change that counts. relative: the limit is a share
    of the start. category: alarms of one category are one piece of evidence, because their signals move together.
    """

    signal: str
    description: str
    direction: Literal[-1, 1]
    relative: bool
    category: str


ALARMS = (
    Alarm("held_out_gap", "gap between optimised and held-out rewards", 1, False, "held-out rewards"),
    Alarm("disagreement", "rank disagreement between the rewards", 1, False, "agreement"),
    Alarm("latent_correlation", "rank correlation of latent and pixel rewards", -1, False, "agreement"),
    Alarm("dark_share", "share of dark pixels", 1, False, "light"),
    Alarm("bright_share", "share of bright pixels", 1, False, "light"),
    Alarm("saturation", "colour saturation", 1, True, "colour"),
    Alarm("colour_entropy", "colour entropy", -1, True, "colour"),
    Alarm("edge_density", "edge density", -1, True, "structure"),
    Alarm("group_diversity", "diversity within prompts", -1, True, "diversity"),
    Alarm("prompt_diversity", "diversity between prompts", -1, True, "diversity"),
)


@dataclass(frozen=True)
class Change:
    """A signal's median over the start and over the window: a single wild probe moves neither."""

    start: float
    now: float

    @property
    def difference(self) -> float:
        """Absolute change since the start."""
        return self.now - self.start

    @property
    def share(self) -> float:
        """Relative change since the start; 0 for a signal that started at 0."""
        return self.difference / abs(self.start) if self.start else 0.0


@dataclass(frozen=True)
class Verdict:
    """The level, one sentence about it, and its alarms: signal -> weight, 1 beyond its limit and 2 beyond twice its limit."""

    level: Level = "healthy"
    message: str = "healthy"
    alarms: Mapping[str, int] = field(default_factory=dict)

    @property
    def severity(self) -> int:
        """0 healthy, 1 suspicious, 2 hacking."""
        return LEVELS.index(self.level)


def changes(start: Sequence[Record], recent: Sequence[Record]) -> dict[str, Change]:
    """Signal -> its change, for all that were measured on either side."""
    before, after = medians(start), medians(recent)
    return {name: Change(before[name], now) for name, now in after.items() if name in before}


def medians(records: Sequence[Record]) -> dict[str, float]:
    """Signal -> its median over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: median(record[name] for record in records if name in record) for name in names}


def with_rises(signals: Mapping[str, Change], optimised: Sequence[str], held_out: Sequence[str]) -> dict[str, Change]:
    """Add the changes that compare rewards to those of `signals`.

    rise/<label>: a reward's change in units of its spread over candidates at the start. held_out_gap: the mean rise of the optimised
    rewards above that of the held-out ones.
    """
    rises = {}
    for label in (*optimised, *held_out):
        reward, spread = signals.get(f"reward/{label}"), signals.get(f"spread/{label}")
        if reward is not None and spread is not None and spread.start > 0:
            rises[label] = reward.difference / spread.start
    result = dict(signals) | {f"rise/{label}": Change(0.0, rise) for label, rise in rises.items()}
    trained, judging = ([rises[label] for label in labels if label in rises] for labels in (optimised, held_out))
    if trained and judging:
        result["held_out_gap"] = Change(0.0, mean(trained) - mean(judging))
    return result


def judge(
    settings: MonitorConfig, optimised: Collection[str], signals: Mapping[str, Change], active: Mapping[str, int]
) -> Verdict:
    """Give the verdict on changes since the start.

    healthy: no optimised reward rose, or nothing else changed for the worse. suspicious: one rose beside alarms of one category.
    hacking: beside alarms of two categories or more, or an alarm of twice its limit. active: weights of the last verdict's alarms, which
    stay until they are clearly over.
    """
    rises = {label: signals[f"rise/{label}"] for label in optimised if f"rise/{label}" in signals}
    rises = {label: rise for label, rise in rises.items() if rise.difference > settings.reward_rise}
    weights = {
        alarm.signal: _weight(settings, alarm, signals[alarm.signal], active.get(alarm.signal, 0))
        for alarm in ALARMS
        if alarm.signal in signals
    }
    raised = [alarm for alarm in ALARMS if weights.get(alarm.signal)]
    if not rises or not raised:
        return Verdict()
    categories: dict[str, int] = {}
    for alarm in raised:
        categories[alarm.category] = max(categories.get(alarm.category, 0), weights[alarm.signal])
    level: Level = "hacking" if sum(categories.values()) > 1 else "suspicious"
    alarms = ", ".join(_describe(alarm, signals[alarm.signal]) for alarm in raised)
    rewards = " and ".join(f"{label} (by {rise.difference:.2g} of its spread)" for label, rise in rises.items())
    message = f"{level}: {alarms}, while the optimised reward rose: {rewards}"
    return Verdict(level, message, {alarm.signal: weights[alarm.signal] for alarm in raised})


def _weight(settings: MonitorConfig, alarm: Alarm, change: Change, before: int) -> int:
    """0: no alarm. 1: a change beyond the limit. 2: beyond twice the limit. before: the weight it had."""
    limit: float | None = getattr(settings.limits, alarm.signal)
    if limit is None:
        return 0
    amount = alarm.direction * (change.share if alarm.relative else change.difference)
    return sum(amount > weight * limit * (RELEASE if before >= weight else 1.0) for weight in (1, 2))


def _describe(alarm: Alarm, change: Change) -> str:
    verb = "rose" if change.difference > 0 else "fell"
    if alarm.relative:
        above = "above" if change.share > 0 else "below"
        return f"{alarm.description} {verb} {abs(change.share):.0%} {above} its start"
    return f"{alarm.description} {verb} from {change.start:.2g} to {change.now:.2g}"
