"""What indexing a data set finds: samples, bad samples, and the count of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

NAMES = 5
"""Bad samples named in a report, for each reason."""
LONG_CAPTION = 300
"""Characters; CLIP's 77 tokens are about as many. The tokenizer cuts what is too long, nothing else does."""
LARGEST_CAPTION = 65_536

CUT_ARCHIVE = "archive cut short"
LEAVES_FOLDER = "leaves the data folder"
MISSING_IMAGE = "missing image"
DUPLICATE = "duplicate key"
BROKEN_LINE = "broken line"


class BadSample(Exception):
    """This sample cannot be used; the text says why, in words that group samples of one kind."""

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Sample:
    """One captioned image. key: unique in its data set. block, offset, length: where its format finds it again.

    width, height: pixels, as the image is looked at; 0 for a prompt without an image.
    """

    key: str
    caption: str
    block: int = 0
    offset: int = 0
    length: int = 0
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Bad:
    """One sample that cannot be used."""

    key: str
    reason: str


@dataclass
class Named:
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
    bad: dict[str, Named] = field(default_factory=dict)
    notes: dict[str, Named] = field(default_factory=dict)

    @property
    def bad_count(self) -> int:
        return sum(named.count for named in self.bad.values())

    def note_good(self, sample: Sample) -> None:
        if len(sample.caption) > LONG_CAPTION:
            self.notes.setdefault(f"caption longer than {LONG_CAPTION} characters", Named()).add([sample.key])

    def note_bad(self, bad: Bad) -> None:
        self.bad.setdefault(bad.reason, Named()).add([printable(bad.key)])

    def merge(self, other: Tally) -> None:
        """Count what `other` saw as well; names in the order of merging."""
        self.seen += other.seen
        for mine, theirs in ((self.bad, other.bad), (self.notes, other.notes)):
            for reason, named in theirs.items():
                mine.setdefault(reason, Named()).add(named.names, named.count)

    def check(self, allowed: float, where: str, key: str = "data.max_bad") -> None:
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
        def read(found: Mapping[str, Any]) -> dict[str, Named]:
            return {reason: Named(entry["count"], list(entry["names"])) for reason, entry in found.items()}

        return cls(tree["seen"], read(tree["bad"]), read(tree["notes"]))


def check_caption(value: object) -> str:
    """The caption without surrounding white space. Raises BadSample."""
    if value is None:
        raise BadSample("missing caption")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadSample("caption is not text") from None
    if not isinstance(value, str) or "\0" in value or not is_text(value):
        raise BadSample("caption is not text")
    text = value.strip()
    if not text:
        raise BadSample("empty caption")
    if len(text) > LARGEST_CAPTION:
        raise BadSample(f"caption longer than {LARGEST_CAPTION} characters")
    return text


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no half of a surrogate pair, no byte that was no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name for one line of a report: control characters escaped, the middle of a very long one left out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in name)
    return shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-57:]}"


def _listed(named: Named) -> str:
    return ", ".join(named.names) + (", ..." if named.count > len(named.names) else "")
