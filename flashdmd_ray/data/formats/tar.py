"""WebDataset: plain tar archives in which a sample is an image and a .txt or .json of the same name, in any order.

Images are read in place, by offset; nothing is ever unpacked.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from flashdmd_ray.data.formats.base import Columns
from flashdmd_ray.data.formats.captions import caption_in
from flashdmd_ray.data.formats.names import Group, absent_shards, group_files
from flashdmd_ray.data.pixels import image_facts
from flashdmd_ray.data.sample import (
    AFTER_END,
    CUT_ARCHIVE,
    LEAVES_FOLDER,
    Bad,
    BadSample,
    Entry,
    Ignored,
    Sample,
    read_caption,
)

SPECIAL = "link or special file in the archive"
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@dataclass(frozen=True)
class TarImages:
    """Archives in the order given; a block is an archive."""

    archives: tuple[Path, ...]
    columns: Columns
    left_out: tuple[Ignored, ...] = ()
    kind = "webdataset tar"
    shuffle_blocks = None

    def files(self) -> Iterable[Path]:
        return self.archives

    def pieces(self) -> int:
        return len(self.archives)

    def name(self, piece: int) -> str:
        """The archive as reports call it: its path below the folder that holds all archives."""
        folder = os.path.commonpath([archive.parent for archive in self.archives])
        return str(self.archives[piece].relative_to(folder))

    def scan(self, piece: int) -> Iterator[Entry]:
        if not piece:
            yield from (*self.left_out, *absent_shards(self.archives))
        archive = self.name(piece)
        with self.archives[piece].open("rb") as file:
            members, damage = read_members(file)
            for entry in group_files([member.info.name for member in members], self.columns.image):
                if isinstance(entry, Group):
                    yield self._sample(piece, f"{archive}:{entry.key}", entry, members)
                else:
                    yield type(entry)(f"{archive}:{entry.key}", entry.reason)
        if damage is not None:
            yield Bad(archive, damage)

    def _sample(self, piece: int, name: str, group: Group, members: list[Member]) -> Entry:
        try:
            if PurePosixPath(group.key).is_absolute() or ".." in PurePosixPath(group.key).parts:
                raise BadSample(LEAVES_FOLDER)
            texts = {suffix: members[position].plain().open for suffix, position in group.captions.items()}
            caption, remarks = read_caption(caption_in(texts, self.columns.caption), self.columns.captionless)
            image = members[group.image].plain()
            width, height, more = image_facts(image.open(), image.info.size)
        except BadSample as bad:
            return Bad(name, bad.reason)
        place = piece, image.info.offset_data, image.info.size
        return Sample(name, caption, *place, width, height, (*remarks, *more))

    def read(self, sample: Sample) -> bytes:
        with self.archives[sample.block].open("rb") as file:
            file.seek(sample.offset)
            return file.read(sample.length)


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def plain(self) -> Member:
        """The member whose bytes lie in the archive in one piece; a hard link's target. Raises BadSample."""
        info = self.info
        if info.islnk():
            try:
                info = self.archive.getmember(info.linkname)
            except KeyError:
                raise BadSample(SPECIAL) from None
        if not info.isreg() or info.sparse is not None:
            raise BadSample(SPECIAL)
        return Member(self.archive, info)

    def open(self) -> IO[bytes]:
        file = self.archive.extractfile(self.info)
        assert file is not None, "a regular member has a file"
        return file


def read_members(file: IO[bytes]) -> tuple[list[Member], str | None]:
    """The files of an archive, or of several that were joined into one file; and what is wrong with its end, if anything."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(6)
    if packed := next((name for magic, name in MAGIC.items() if head.startswith(magic)), None):
        return [], f"{packed} file called .tar; unpack it to a plain .tar"
    members: list[Member] = []
    start: int | None = 0
    while start is not None:
        file.seek(start)
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
            for info in archive:
                if info.isreg() and info.offset_data + info.size > size and info.sparse is None:
                    return members, CUT_ARCHIVE
                if not info.isdir():
                    members.append(Member(archive, info))
        except (tarfile.TarError, OSError, ValueError, OverflowError):  # no archive, a member cut short, absurd sizes
            return members, CUT_ARCHIVE
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # an archive ends with blocks of zeros
            return members, CUT_ARCHIVE if archive.offset > start or not start else AFTER_END
        start = _next_block(file, archive.offset)
    return members, None


def _next_block(file: IO[bytes], start: int) -> int | None:
    """The first block from there on that is not zeros: another archive, or bytes that are none."""
    file.seek(start)
    while chunk := file.read(2**20):
        rest = chunk.lstrip(b"\0")
        if rest:
            position = file.tell() - len(rest)
            return position - (position - start) % tarfile.BLOCKSIZE
    return None
