"""Errors as one line of a message. Imports nothing."""

from __future__ import annotations

LONGEST = 300
"""Characters of a foreign error inside a message of ours."""


def one_line(error: object, longest: int = LONGEST) -> str:
    """The text of an error without line breaks, cut after `longest` characters; the name of its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]} ..."


def typed_line(error: BaseException, longest: int = LONGEST) -> str:
    """Type and text of an error on one line: "KeyError: 'weight'"; see `one_line`."""
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "), longest)
