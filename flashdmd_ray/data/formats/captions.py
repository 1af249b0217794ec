"""The caption of an image in a file beside it: text, or a field of a JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import IO

from flashdmd_ray.data.formats.base import CAPTIONS, is_filled
from flashdmd_ray.data.formats.names import CAPTION_SUFFIXES
from flashdmd_ray.data.sample import BadSample, decode_text
from flashdmd_ray.run.json_text import unique_names

LARGEST_TEXT = 16 * 2**20


def caption_in(texts: Mapping[str, Callable[[], IO[bytes]]], column: str | None) -> object:
    """The caption in the files beside an image, None where there is none. Raises BadSample.

    texts: suffix -> opens that file. column: which suffix, or which field of the JSON; None takes the first with a text.
    """
    found: list[object] = []
    for suffix in CAPTION_SUFFIXES:
        if suffix not in texts or (column is not None and suffix not in (f".{column}", ".json")):
            continue
        with texts[suffix]() as file:
            data = file.read(LARGEST_TEXT + 1)
        if len(data) > LARGEST_TEXT:
            raise BadSample(f"text file above {LARGEST_TEXT // 2**20} MiB")
        found.append(json_caption(data, column) if suffix == ".json" else data)
        if found[-1].strip() if isinstance(found[-1], bytes) else is_filled(found[-1]):
            return found[-1]
    return next((value for value in found if value is not None), None)


def json_caption(data: bytes, column: str | None) -> object:
    """The caption in a JSON object beside an image: the named field, else the first usual one with a text. Raises BadSample."""
    try:
        tree = json.loads(decode_text(data), object_pairs_hook=unique_names)
    except (ValueError, RecursionError):
        raise BadSample("broken JSON") from None
    if not isinstance(tree, dict):
        return tree if isinstance(tree, str) else None
    present = [name for name in ((column,) if column else CAPTIONS) if name in tree]
    return next((tree[name] for name in present if is_filled(tree[name])), tree[present[0]] if present else None)
