"""The count of what indexing and decoding met: samples, bad ones by reason, remarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flashdmd_ray.data.sample import UNKNOWN_LOSS, Bad, Entry, Sample, printable

NAMES = 5
"""Bad samples named in a report, for each reason."""
LONG_CAPTION = 300
"""Characters; CLIP's 77 tokens are about as many. The tokenizer cuts what is too long, nothing else does."""


@dataclass
class ReasonCount:
    """Number of samples, and the names of the first few."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, names: Iterable[str], count: int = 1) -> None:
        self.count += count
        for name in names:
            if len(self.names) < NAMES and name not in self.names:
                self.names.append(name)


@dataclass
class Tally:
    """Good samples, bad ones by reason, and what is no sample by reason; each thing in a data set is in one of the three.

    notes: remarks on good samples.
    """

    good: int = 0
    bad: dict[str, ReasonCount] = field(default_factory=dict)
    ignored: dict[str, ReasonCount] = field(default_factory=dict)
    notes: dict[str, ReasonCount] = field(default_factory=dict)

    @property
    def bad_count(self) -> int:
        return sum(named.count for named in self.bad.values())

    @property
    def samples(self) -> int:
        """Good and bad samples."""
        return self.good + self.bad_count

    def add(self, entry: Entry) -> None:
        """Count one thing of a data set."""
        if isinstance(entry, Sample):
            self.good += 1
            long = [f"caption longer than {LONG_CAPTION} characters"] if len(entry.caption) > LONG_CAPTION else []
            for note in (*entry.remarks, *long):
                self._count(self.notes, note, entry.key)
        else:
            self._count(self.bad if isinstance(entry, Bad) else self.ignored, entry.reason, entry.key)

    def spoil(self, bad: Bad) -> None:
        """Count a good sample as bad after all."""
        self.good -= 1
        self.add(bad)

    @staticmethod
    def _count(counts: dict[str, ReasonCount], reason: str, key: str) -> None:
        counts.setdefault(reason, ReasonCount()).add([printable(key)])

    def merge(self, other: Tally) -> None:
        """Add the counts of `other`; names in the order of merging."""
        self.good += other.good
        for mine, theirs in ((self.bad, other.bad), (self.ignored, other.ignored), (self.notes, other.notes)):
            for reason, named in theirs.items():
                mine.setdefault(reason, ReasonCount()).add(named.names, named.count)

    @classmethod
    def merged(cls, tallies: Iterable[Tally]) -> Self:
        """The counts of all of them."""
        total = cls()
        for tally in tallies:
            total.merge(tally)
        return total

    def summary(self) -> str:
        """Everything that is no good sample, in one line."""
        return "; ".join([*self.lines(), *self.ignored_lines()]) or "nothing there"

    def check(self, allowed: float, where: str, key: str = "data.max_bad_fraction") -> None:
        """Raise ValueError, with the report, when more than `allowed` of the samples are bad. key: the setting of that limit.

        Archives that lost nobody knows how much are refused whatever the share.
        """
        if unknown := [line for line in self.lines() if line.startswith(UNKNOWN_LOSS)]:
            raise ValueError(f"{where}: {'; '.join(unknown)}; nobody knows how much is lost, make or fetch it again")
        if self.bad_count > allowed * self.samples:
            share = self.bad_count / self.samples
            raise ValueError(
                f"{where}: {self.bad_count} of {self.samples} samples are bad ({share:.1%}, allowed {allowed:.1%}): "
                f"{'; '.join(self.lines())}; mend or remove them, or raise {key}"
            )

    def lines(self) -> list[str]:
        """One line for each reason of bad samples, most frequent first."""
        return _lines(self.bad)

    def ignored_lines(self) -> list[str]:
        """One line for each reason of what is no sample."""
        return _lines(self.ignored)

    def note_lines(self) -> list[str]:
        """One line for each remark."""
        return _lines(self.notes)

    def pairs(self) -> tuple[str, ...]:
        """The bad samples that are named, as "reason<tab>name": texts, which ranks can join."""
        return tuple(f"{reason}\t{name}" for reason, named in self.bad.items() for name in named.names)

    def as_json(self) -> dict[str, Any]:
        kinds = (("bad", self.bad), ("ignored", self.ignored), ("notes", self.notes))
        return {"good": self.good} | {
            kind: {reason: {"count": n.count, "names": n.names} for reason, n in counts.items()}
            for kind, counts in kinds
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        def read(counts: Mapping[str, Any]) -> dict[str, ReasonCount]:
            return {reason: ReasonCount(entry["count"], list(entry["names"])) for reason, entry in counts.items()}

        return cls(tree["good"], read(tree["bad"]), read(tree["ignored"]), read(tree["notes"]))


def _lines(counts: Mapping[str, ReasonCount]) -> list[str]:
    ordered = sorted(counts.items(), key=lambda item: -item[1].count)
    return [f"{reason}: {named.count} ({_listed(named)})" for reason, named in ordered]


def _listed(named: ReasonCount) -> str:
    return ", ".join(named.names) + (", ..." if named.count > len(named.names) else "")
