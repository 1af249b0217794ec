"""An image folder: images anywhere below it, with captions in metadata.jsonl, .csv or .parquet, or in a text file beside each image."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO

from flashdmd_ray.data.formats.base import Columns, choose_caption
from flashdmd_ray.data.formats.captions import caption_in
from flashdmd_ray.data.formats.lines import HEAD, csv_rows, json_rows
from flashdmd_ray.data.formats.names import Group, group_files, is_system_file, same_name
from flashdmd_ray.data.formats.parquet import table_rows
from flashdmd_ray.data.pixels import OTHER_SUFFIXES, SUFFIXES, image_facts
from flashdmd_ray.data.sample import (
    BROKEN_LINE,
    DUPLICATE,
    LEAVES_FOLDER,
    MISSING_IMAGE,
    SYSTEM_FILE,
    Bad,
    BadSample,
    Entry,
    Ignored,
    Sample,
    read_caption,
)

METADATA = {"metadata.jsonl": json_rows, "metadata.csv": csv_rows, "metadata.parquet": table_rows}
FILE_NAME = "file_name"
NO_NAME = "row that names no file in column {}; data.image names the right one"
PIECE = 2048
Captioned = tuple[str, object]
"""The name of an image, and its caption or how to read it: a function without arguments."""


@dataclass(frozen=True)
class FolderImages:
    """Images in the order of the metadata file, or of their names; they are one block."""

    root: Path
    columns: Columns
    kind = "image folder"
    shuffle_blocks = None

    def files(self) -> Iterable[Path]:
        yield from (self.root / name for name in self._files[0])

    def pieces(self) -> int:
        return max(1, -(-len(self._entries) // PIECE))

    def scan(self, piece: int) -> Iterator[Entry]:
        for entry in self._entries[piece * PIECE : (piece + 1) * PIECE]:
            yield entry if isinstance(entry, Bad | Ignored) else self._sample(*entry)

    def read(self, sample: Sample) -> bytes:
        try:
            return self._inside(sample.key).read_bytes()
        except OSError:
            raise BadSample(MISSING_IMAGE) from None

    def _sample(self, name: str, caption: object) -> Sample | Bad:
        try:
            text, remarks = read_caption(caption() if callable(caption) else caption, self.columns.captionless)
            path = self._inside(name)
            length = path.stat().st_size
            with path.open("rb") as file:
                width, height, more = image_facts(file, length)
        except BadSample as bad:
            return Bad(name, bad.reason)
        except (OSError, ValueError):  # absent, a folder, or a name that no file can have
            return Bad(name, MISSING_IMAGE)
        return Sample(name, text, 0, 0, length, width, height, (*remarks, *more))

    def _inside(self, name: str) -> Path:
        """The file, links followed. Raises BadSample when it lies elsewhere, or is no plain file."""
        path = Path(os.path.realpath(self.root / name))
        if not any(path.is_relative_to(folder) for folder in self._folders):
            raise BadSample(LEAVES_FOLDER)
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise BadSample(MISSING_IMAGE if path.is_dir() else "not a plain file")
        return path

    @cached_property
    def _folders(self) -> list[Path]:
        """Folders where files may lie: this one, and for a snapshot in the hub's cache in the blobs that its links lead to."""
        root = Path(os.path.realpath(self.root))
        snapshots = [parent.parent for parent in (root, *root.parents) if parent.parent.name == "snapshots"]
        return [root, *(folder.parent / "blobs" for folder in snapshots)]

    @cached_property
    def _files(self) -> tuple[list[str], list[Bad | Ignored]]:
        """Every file below the folder, sorted, and what could not be looked into."""
        names: list[str] = []
        passed: list[Bad | Ignored] = []

        def unreadable(error: OSError) -> None:
            passed.append(Bad(os.path.relpath(error.filename, self.root), "folder that cannot be read"))

        for folder, folders, files in os.walk(self.root, onerror=unreadable):
            here = os.path.relpath(folder, self.root)
            below = partial(os.path.join, "" if here == "." else here)
            passed += [
                Ignored(below(name), "link to a folder, not followed")
                for name in folders
                if os.path.islink(os.path.join(folder, name)) and not is_system_file(below(name))
            ]
            folders[:] = sorted(name for name in folders if not is_system_file(name))
            names += [below(name) for name in files]
        return sorted(names), passed

    @cached_property
    def _entries(self) -> list[Captioned | Bad | Ignored]:
        names, passed = self._files
        listed = [name for name in names if os.path.basename(name).lower() in METADATA and not is_system_file(name)]
        return [*(self._listed(listed) if listed else self._beside()), *passed]

    def _beside(self) -> Iterator[Captioned | Bad | Ignored]:
        """Images with the text files beside them."""
        names = self._files[0]
        for entry in group_files(names, self.columns.image):
            if isinstance(entry, Group):
                texts = {suffix: names[position] for suffix, position in entry.captions.items()}
                yield names[entry.image], partial(self._text, texts)
            else:
                yield entry

    def _text(self, texts: dict[str, str]) -> object:
        openers = {suffix: partial(self._open, name) for suffix, name in texts.items()}
        try:
            return caption_in(openers, self.columns.caption)
        except OSError:
            raise BadSample("caption file that cannot be read") from None

    def _open(self, name: str) -> IO[bytes]:
        return self._inside(name).open("rb")

    def _listed(self, metadata: list[str]) -> Iterator[Captioned | Bad | Ignored]:
        """Images that metadata files list, in their order, then the images that none mentions."""
        names = set(self._files[0])
        alike: dict[str, list[str]] = {}
        for name in sorted(names):
            alike.setdefault(same_name(name).casefold(), []).append(name)
        seen: set[str] = set()
        for path in metadata:
            rows = list(METADATA[os.path.basename(path).lower()](self.root / path))
            whole = [row for _, row in rows if isinstance(row, dict)]
            file_name = self.columns.image or FILE_NAME
            heads = [{key: value for key, value in row.items() if key != file_name} for row in whole[:HEAD]]
            column = choose_caption(self.columns, heads, self.root / path) if heads and any(heads) else ""
            for line, row in rows:
                given = row.get(file_name) if isinstance(row, dict) else None
                if not isinstance(given, str) or not given:
                    reason = NO_NAME.format(file_name) if isinstance(row, dict) else BROKEN_LINE
                    yield Bad(f"{os.path.dirname(path)}/{line}".lstrip("/"), reason)
                    continue
                name = self._found(os.path.dirname(path), given, names, alike)
                yield Bad(name, DUPLICATE) if name in seen else (name, row.get(column))
                seen.add(name)
        for name in self._files[0]:
            if name.lower().endswith(SUFFIXES) and name not in seen:
                yield Ignored(name, SYSTEM_FILE) if is_system_file(name) else (name, None)
            elif name.lower().endswith(OTHER_SUFFIXES) and name not in seen:
                yield Ignored(name, "image of a form that is not read")

    def _found(self, folder: str, given: str, names: set[str], alike: dict[str, list[str]]) -> str:
        """The file that a metadata file means: by its name, or with Windows' slashes, accents written otherwise, or another letter case."""
        roots = (self.root.absolute(), Path(os.path.realpath(self.root)))
        candidates = []
        for name in (given, given.replace("\\", "/")):
            root = next((root for root in roots if os.path.isabs(name) and Path(name).is_relative_to(root)), None)
            relative = os.path.join(folder, name) if root is None else str(Path(name).relative_to(root))
            candidates.append(os.path.normpath(relative))
        for name in list(candidates):
            equal = alike.get(same_name(name).casefold(), [])
            same = [other for other in equal if same_name(other) == same_name(name)]
            candidates += same or (equal if len(equal) == 1 else [])
        return next((name for name in candidates if name in names), candidates[0])
