"""The count of what indexing and decoding met: samples, bad ones by reason, remarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from flashdmd_ray.data.sample import Bad, Sample, printable

NAMES = 5
"""Bad samples named in a report, for each reason."""
LONG_CAPTION = 300
"""Characters; CLIP's 77 tokens are about as many. The tokenizer cuts what is too long, nothing else does."""


@dataclass
class ReasonCount:
    """How many samples, and the names of the first few."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, names: Iterable[str], count: int = 1) -> None:
        self.count += count
        for name in names:
            if len(self.names) < NAMES and name not in self.names:
                self.names.append(name)


@dataclass
class Tally:
    """Samples seen, the bad ones by reason, and remarks on good ones."""

    seen: int = 0
    bad: dict[str, ReasonCount] = field(default_factory=dict)
    notes: dict[str, ReasonCount] = field(default_factory=dict)

    @property
    def bad_count(self) -> int:
        return sum(named.count for named in self.bad.values())

    def note_good(self, sample: Sample) -> None:
        if len(sample.caption) > LONG_CAPTION:
            self.notes.setdefault(f"caption longer than {LONG_CAPTION} characters", ReasonCount()).add([sample.key])

    def note_bad(self, bad: Bad) -> None:
        self.bad.setdefault(bad.reason, ReasonCount()).add([printable(bad.key)])

    def merge(self, other: Tally) -> None:
        """Count what `other` saw as well; names in the order of merging."""
        self.seen += other.seen
        for mine, theirs in ((self.bad, other.bad), (self.notes, other.notes)):
            for reason, named in theirs.items():
                mine.setdefault(reason, ReasonCount()).add(named.names, named.count)

    def check(self, allowed: float, where: str, key: str = "data.max_bad_fraction") -> None:
        """Raise ValueError, with the report, when more than `allowed` of the samples seen are bad. key: the setting of that limit."""
        if self.bad_count > allowed * self.seen:
            share = self.bad_count / self.seen
            raise ValueError(
                f"{where}: {self.bad_count} of {self.seen} samples are bad ({share:.1%}, allowed {allowed:.1%}): "
                f"{'; '.join(self.lines())}; mend or remove them, or raise {key}"
            )

    def lines(self) -> list[str]:
        """One line for each reason, most frequent first."""
        ordered = sorted(self.bad.items(), key=lambda item: -item[1].count)
        return [f"{reason}: {named.count} ({_listed(named)})" for reason, named in ordered]

    def pairs(self) -> tuple[str, ...]:
        """The bad samples that are named, as "reason<tab>name": texts, which ranks can join."""
        return tuple(f"{reason}\t{name}" for reason, named in self.bad.items() for name in named.names)

    def as_json(self) -> dict[str, Any]:
        return {"seen": self.seen} | {
            name: {reason: {"count": n.count, "names": n.names} for reason, n in found.items()}
            for name, found in (("bad", self.bad), ("notes", self.notes))
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Self:
        def read(found: Mapping[str, Any]) -> dict[str, ReasonCount]:
            return {reason: ReasonCount(entry["count"], list(entry["names"])) for reason, entry in found.items()}

        return cls(tree["seen"], read(tree["bad"]), read(tree["notes"]))


def _listed(named: ReasonCount) -> str:
    return ", ".join(named.names) + (", ..." if named.count > len(named.names) else "")
