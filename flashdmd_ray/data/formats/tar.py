"""WebDataset: plain tar archives in which a sample is an image and a .txt or .json of the same name, one after the other.

Images are read in place, by offset; nothing is ever unpacked.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flashdmd_ray.data.formats.base import CAPTIONS, Columns
from flashdmd_ray.data.pixels import SUFFIXES, image_size
from flashdmd_ray.data.sample import (
    CUT_ARCHIVE,
    DUPLICATE,
    LARGEST_CAPTION,
    LEAVES_FOLDER,
    MISSING_IMAGE,
    Bad,
    BadSample,
    Sample,
    check_caption,
)


@dataclass(frozen=True)
class TarImages:
    """Archives in the order given; a block is an archive."""

    archives: tuple[Path, ...]
    columns: Columns
    kind = "webdataset tar"
    shuffle_blocks = None

    def files(self) -> Iterable[Path]:
        return self.archives

    def pieces(self) -> int:
        return len(self.archives)

    def scan(self, piece: int) -> Iterator[Sample | Bad]:
        path = self.archives[piece]
        seen: set[str] = set()
        try:
            with tarfile.open(path, "r:") as archive:
                for key, members in _groups(archive):
                    if key in seen:
                        yield Bad(f"{path.name}:{key}", DUPLICATE)
                        continue
                    seen.add(key)
                    yield self._sample(archive, piece, key, members)
                if _is_cut(archive, path):
                    yield Bad(path.name, CUT_ARCHIVE)
        except tarfile.TarError:  # raised where the data of a member ends early, and by an archive that is none
            yield Bad(path.name, CUT_ARCHIVE)

    def _sample(
        self, archive: tarfile.TarFile, piece: int, key: str, members: dict[str, tarfile.TarInfo]
    ) -> Sample | Bad:
        name = f"{self.archives[piece].name}:{key}"
        try:
            if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
                raise BadSample(LEAVES_FOLDER)
            caption = check_caption(_caption(archive, members, self.columns.caption))
            image = next((m for suffix, m in members.items() if f".{suffix.split('.')[-1]}" in SUFFIXES), None)
            if image is None:
                raise BadSample(MISSING_IMAGE)
            if not image.isreg() or image.sparse is not None:
                raise BadSample("link or special file in the archive")
            file = archive.extractfile(image)
            assert file is not None, "a regular member has a file"
            width, height = image_size(file, image.size)
        except BadSample as bad:
            return Bad(name, bad.reason)
        return Sample(name, caption, piece, image.offset_data, image.size, width, height)

    def read(self, sample: Sample) -> bytes:
        with self.archives[sample.block].open("rb") as file:
            file.seek(sample.offset)
            return file.read(sample.length)


def _groups(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, members by suffix) of samples whose members follow each other. A key ends at the first dot of its name."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if member.isdir():
            continue
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = name.partition(".")
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if current is not None and (key != current or suffix in members):
            yield current, members
            members = {}
        current = key
        members[suffix] = member
    if current is not None:
        yield current, members


def _caption(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], column: str | None) -> object:
    if column is None and "txt" in members:
        return _text(archive, members["txt"])
    if "json" not in members:
        return None
    try:
        tree = json.loads(_text(archive, members["json"]))
    except ValueError:
        raise BadSample("caption is not text") from None
    names = CAPTIONS if column is None else (column,)
    return next((tree[name] for name in names if name in tree), None) if isinstance(tree, dict) else None


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member) if member.isreg() else None
    if file is None:
        raise BadSample("link or special file in the archive")
    return file.read(16 * LARGEST_CAPTION)  # a .json beside an image may hold more than the caption


def _is_cut(archive: tarfile.TarFile, path: Path) -> bool:
    """An archive ends with blocks of zeros; after the last member that was found there must be one."""
    with path.open("rb") as file:
        file.seek(archive.offset)
        return file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE)
