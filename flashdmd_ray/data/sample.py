"""Samples of a data set, samples that cannot be used, and the checks that every format shares."""

from __future__ import annotations

from dataclasses import dataclass

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
