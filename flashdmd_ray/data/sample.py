"""Samples of a data set, samples that cannot be used, and the checks that every format shares."""

from __future__ import annotations

from dataclasses import dataclass, field

LARGEST_CAPTION = 65_536

CUT_ARCHIVE = "archive cut short"
AFTER_END = "bytes after the end of the archive"
UNKNOWN_LOSS = (CUT_ARCHIVE, AFTER_END)
"""Reasons behind which nobody knows how many samples are."""
LEAVES_FOLDER = "leaves the data folder"
MISSING_IMAGE = "missing image"
DUPLICATE = "duplicate key"
BROKEN_LINE = "broken line"
NOT_UTF8 = "text is not UTF-8; save it as UTF-8"
NULS = "text holds NUL characters; save it as UTF-8"
SYSTEM_FILE = "file of an operating system"


class BadSample(Exception):
    """This sample cannot be used; the text says why, in words that group samples of one kind."""

    @property
    def reason(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Sample:
    """One captioned image. key: unique in its data set. block, offset, length: where its format finds it again.

    width, height: pixels, as the image is looked at; 0 for a prompt without an image. remarks: for a report, not kept in the index.
    """

    key: str
    caption: str
    block: int = 0
    offset: int = 0
    length: int = 0
    width: int = 0
    height: int = 0
    remarks: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Bad:
    """One sample that cannot be used."""

    key: str
    reason: str


@dataclass(frozen=True)
class Ignored:
    """Something in a data set that is no sample. reason: why, in words that group things of one kind."""

    key: str
    reason: str


Entry = Sample | Bad | Ignored


def decode_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one. Raises BadSample."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise BadSample(NOT_UTF8) from None


def first_text(value: object) -> object:
    """The first text of a list of captions, as COCO has them; any other value as it is."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return next((item for item in value if item.strip()), value[0])
    return value


def check_caption(value: object) -> str:
    """The caption without surrounding white space. Raises BadSample."""
    if value is None:
        raise BadSample("missing caption")
    value = first_text(decode_text(value) if isinstance(value, bytes) else value)
    if not isinstance(value, str):
        raise BadSample("caption is not text")
    if "\0" in value:
        raise BadSample(NULS)
    if not is_text(value):
        raise BadSample(NOT_UTF8)
    text = value.strip()
    if not text:
        raise BadSample("empty caption")
    if len(text) > LARGEST_CAPTION:
        raise BadSample(f"caption longer than {LARGEST_CAPTION} characters")
    return text


def read_caption(value: object, optional: bool) -> tuple[str, tuple[str, ...]]:
    """The caption, and remarks on it. optional: an image without one is good, and its caption is empty. Raises BadSample."""
    if optional and (value is None or (isinstance(value, str | bytes) and not value.strip())):
        return "", ("no caption, and none is needed beside data.prompts",)
    text = check_caption(value)
    return text, ("list of captions, of which the first is used",) if isinstance(value, list) and len(value) > 1 else ()


def is_text(text: str) -> bool:
    """Return True if it can be written as UTF-8: no half of a surrogate pair, no byte that was no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(name: str) -> str:
    """A name for one line of a report: control characters escaped, the middle of a very long one left out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in name)
    return shown if len(shown) <= 120 else f"{shown[:60]}...{shown[-57:]}"
