"""An image folder: images anywhere below it, and a metadata.jsonl with one {"file_name": ..., "text": ...} for each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flashdmd_ray.data.formats.base import CAPTIONS, Columns, choose
from flashdmd_ray.data.pixels import SUFFIXES, image_size
from flashdmd_ray.data.sample import (
    BROKEN_LINE,
    DUPLICATE,
    LEAVES_FOLDER,
    MISSING_IMAGE,
    Bad,
    BadSample,
    Sample,
    check_caption,
)

METADATA = "metadata.jsonl"
PIECE = 2048


@dataclass(frozen=True)
class FolderImages:
    """Images in the order of metadata.jsonl; they are one block."""

    root: Path
    columns: Columns
    kind = "image folder"
    shuffle_blocks = None

    def files(self) -> Iterable[Path]:
        yield self.root / METADATA
        yield from (self.root / name for name in self._images)

    def pieces(self) -> int:
        return max(1, -(-len(self._entries) // PIECE))

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        for entry in self._entries[piece * PIECE : (piece + 1) * PIECE]:
            yield entry if isinstance(entry, Bad) else self._sample(*entry)

    def read(self, sample: Sample) -> bytes:
        try:
            return self._inside(sample.key).read_bytes()
        except OSError:
            raise BadSample(MISSING_IMAGE) from None

    def _sample(self, name: str, caption: object) -> Sample | Bad:
        try:
            text = check_caption(caption)
            path = self._inside(name)
            length = path.stat().st_size
            with path.open("rb") as file:
                width, height = image_size(file, length)
        except BadSample as bad:
            return Bad(name, bad.reason)
        except (OSError, ValueError):  # absent, a folder, or a name that no file can have
            return Bad(name, MISSING_IMAGE)
        return Sample(name, text, 0, 0, length, width, height)

    def _inside(self, name: str) -> Path:
        """The file, links followed. Raises BadSample when it is not below the folder."""
        real = os.path.realpath(self.root / name)
        if os.path.commonpath([real, os.path.realpath(self.root)]) != os.path.realpath(self.root):
            raise BadSample(LEAVES_FOLDER)
        return Path(real)

    @cached_property
    def _images(self) -> list[str]:
        """Image files below the folder, sorted; links to folders are not followed, hidden files not seen."""
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            here = os.path.relpath(folder, self.root)
            images = (name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))
            found += [name if here == "." else f"{here}/{name}" for name in images]
        return sorted(found)

    @cached_property
    def _entries(self) -> list[tuple[str, object] | Bad]:
        """What metadata.jsonl lists, in its order, then the images that it does not mention."""
        entries: list[tuple[str, object] | Bad] = []
        seen: set[str] = set()
        field: str | None = None
        with (self.root / METADATA).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                tree = _object(line)
                name = tree.get("file_name") if tree else None
                if tree is None or not isinstance(name, str) or not name:
                    entries.append(Bad(f"{METADATA} line {number}", BROKEN_LINE))
                    continue
                name = os.path.normpath(name)
                if field is None:
                    field = self._caption_field(tree)
                entries.append(Bad(name, DUPLICATE) if name in seen else (name, tree.get(field)))
                seen.add(name)
        return entries + [(name, None) for name in self._images if name not in seen]

    def _caption_field(self, tree: dict[str, object]) -> str:
        """The name of the caption, decided by the first line that is whole."""
        present = [name for name in tree if name != "file_name"]
        return choose(self.columns.caption, CAPTIONS, present, "data.caption", self.root / METADATA)


def _object(line: bytes) -> dict[str, object] | None:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None
