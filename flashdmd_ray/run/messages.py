"""Errors as one line of a message. Imports nothing."""

from __future__ import annotations

LONGEST = 300
"""Characters of a foreign error inside a message of ours."""


def one_line(error: object, longest: int = LONGEST) -> str:
    """The text of an error without line breaks, its middle left out beyond `longest` characters; the name of its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= longest:
        return text
    end = longest // 3  # where a file's name often stands
    return f"{text[: longest - end]} ... {text[-end:]}"


def typed_line(error: BaseException, longest: int = LONGEST) -> str:
    """Type and text of an error on one line: "KeyError: 'weight'"; see `one_line`."""
    return one_line(f"{type(error).__name__}: {error}".removesuffix(": "), longest)
