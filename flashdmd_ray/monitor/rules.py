"""What makes a reward look hacked: signs, each a change since the run's own beginning, and the verdict that follows from them.

Neither half of the evidence is enough alone. A reward that rises is what training is for; images that lose edges may belong to a run whose
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
"""A sign once seen is gone when its change falls below this part of its limit: a verdict must not flicker."""


@dataclass(frozen=True)
class Sign:
    """One thing that can go wrong. signal: its name in records and of its limit in `monitor.limits`. direction: of the change that counts.
    facet: signs of one facet are one piece of evidence, because they move together."""

    signal: str
    words: str
    direction: Literal[-1, 1]
    relative: bool
    facet: str


SIGNS = (
    Sign("held_out_gap", "gap between optimised and held-out rewards", 1, False, "held-out rewards"),
    Sign("disagreement", "rank disagreement between the rewards", 1, False, "agreement"),
    Sign("latent_correlation", "rank correlation of latent and pixel rewards", -1, False, "agreement"),
    Sign("dark_share", "share of dark pixels", 1, False, "light"),
    Sign("bright_share", "share of bright pixels", 1, False, "light"),
    Sign("saturation", "colour saturation", 1, True, "colour"),
    Sign("colour_entropy", "colour entropy", -1, True, "colour"),
    Sign("edge_density", "edge density", -1, True, "structure"),
    Sign("group_diversity", "diversity within prompts", -1, True, "diversity"),
    Sign("prompt_diversity", "diversity between prompts", -1, True, "diversity"),
)


@dataclass(frozen=True)
class Change:
    """Of one signal, from its median over the start to its median over the window: a single wild probe moves neither."""

    start: float
    now: float

    @property
    def difference(self) -> float:
        return self.now - self.start

    @property
    def share(self) -> float:
        """Of where it started; 0 for a signal that started at 0."""
        return self.difference / abs(self.start) if self.start else 0.0


@dataclass(frozen=True)
class Verdict:
    """signs: the names of the signals that led to it, each with its weight: 1, or 2 beyond twice its limit."""

    level: Level = "healthy"
    words: str = "healthy"
    signs: Mapping[str, int] = field(default_factory=dict)

    @property
    def severity(self) -> int:
        """0 healthy, 1 suspicious, 2 hacking."""
        return LEVELS.index(self.level)


def changes(start: Sequence[Record], recent: Sequence[Record]) -> dict[str, Change]:
    """Signal -> how it moved, for all that were measured on either side."""
    before, after = medians(start), medians(recent)
    return {name: Change(before[name], now) for name, now in after.items() if name in before}


def medians(records: Sequence[Record]) -> dict[str, float]:
    """Signal -> its median over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: median(record[name] for record in records if name in record) for name in names}


def with_rises(moved: Mapping[str, Change], optimised: Sequence[str], held_out: Sequence[str]) -> dict[str, Change]:
    """`moved`, and rise/<label>: a reward's change in units of its spread over candidates at the start; held_out_gap: the mean rise of the
    optimised rewards above that of the held-out ones."""
    rises = {}
    for label in (*optimised, *held_out):
        reward, spread = moved.get(f"reward/{label}"), moved.get(f"spread/{label}")
        if reward is not None and spread is not None and spread.start > 0:
            rises[label] = reward.difference / spread.start
    found = dict(moved) | {f"rise/{label}": Change(0.0, rise) for label, rise in rises.items()}
    raised, judging = ([rises[label] for label in labels if label in rises] for labels in (optimised, held_out))
    if raised and judging:
        found["held_out_gap"] = Change(0.0, mean(raised) - mean(judging))
    return found


def judge(
    settings: MonitorConfig, optimised: Collection[str], moved: Mapping[str, Change], standing: Mapping[str, int]
) -> Verdict:
    """The verdict on changes since the start.

    healthy: no optimised reward rose, or nothing else changed for the worse. suspicious: one rose beside signs of one facet.
    hacking: beside signs of two facets or more, or a sign of twice its limit. standing: signs of the verdict before by their weight, which
    stay until they are clearly gone.
    """
    rose = {label: moved[f"rise/{label}"] for label in optimised if f"rise/{label}" in moved}
    rose = {label: by for label, by in rose.items() if by.difference > settings.reward_rise}
    weights = {
        s.signal: _weight(settings, s, moved[s.signal], standing.get(s.signal, 0)) for s in SIGNS if s.signal in moved
    }
    seen = [sign for sign in SIGNS if weights.get(sign.signal)]
    if not rose or not seen:
        return Verdict()
    facets = {sign.facet: max(weights[s.signal] for s in seen if s.facet == sign.facet) for sign in seen}
    level: Level = "hacking" if sum(facets.values()) > 1 else "suspicious"
    signs = ", ".join(_in_words(sign, moved[sign.signal]) for sign in seen)
    rewards = " and ".join(f"{label} (by {by.difference:.2g} of its spread)" for label, by in rose.items())
    words = f"{level}: {signs}, while the optimised reward rose: {rewards}"
    return Verdict(level, words, {sign.signal: weights[sign.signal] for sign in seen})


def _weight(settings: MonitorConfig, sign: Sign, change: Change, before: int) -> int:
    """0: no sign. 1: a change beyond the limit. 2: beyond twice the limit. before: the weight it had."""
    limit: float | None = getattr(settings.limits, sign.signal)
    if limit is None:
        return 0
    by = sign.direction * (change.share if sign.relative else change.difference)
    return sum(by > weight * limit * (RELEASE if before >= weight else 1.0) for weight in (1, 2))


def _in_words(sign: Sign, change: Change) -> str:
    verb = "rose" if change.difference > 0 else "fell"
    if sign.relative:
        return f"{sign.words} {verb} {abs(change.share):.0%} {'above' if change.share > 0 else 'below'} its start"
    return f"{sign.words} {verb} from {change.start:.2g} to {change.now:.2g}"
