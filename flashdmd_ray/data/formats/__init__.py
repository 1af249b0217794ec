"""The formats of data sets, and how a source says which one it is."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.data.formats.base import Columns, ImageFormat, TextFormat
from flashdmd_ray.data.formats.folder import METADATA, FolderImages
from flashdmd_ray.data.formats.hub import PREFIX, HubImages
from flashdmd_ray.data.formats.names import files_below
from flashdmd_ray.data.formats.parquet import ParquetImages, holds_images
from flashdmd_ray.data.formats.prompts import JsonPrompts, ParquetPrompts, TextPrompts
from flashdmd_ray.data.formats.tar import TarImages
from flashdmd_ray.data.pixels import OTHER_SUFFIXES, SUFFIXES
from flashdmd_ray.data.sample import Ignored

__all__ = [
    "PROMPTS",
    "Columns",
    "ImageFormat",
    "TextFormat",
    "files_below",
    "holds_images",
    "open_images",
    "open_prompts",
]

LIST_OF_ARCHIVE = "table that lists what is in an archive"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
PROMPTS = (".txt", ".jsonl", ".ndjson", ".txt.gz", ".jsonl.gz", ".ndjson.gz")
"""Ends of files of prompts, beside tables."""
FORMS = "a .tar or .parquet file, a folder of them, a folder of images, or hf:owner/name"


def open_images(source: str, columns: Columns) -> ImageFormat:
    """The format of captioned images at `source`; reads no sample. Raises ValueError, one line, when there is none.

    A .tar or .parquet file, a folder of them, a folder of images with metadata.jsonl, .csv or .parquet or a .txt beside each, a folder
    written by `save_to_disk`, or hf:owner/name[:split]. Tables beside archives or folders of the same name are lists of what is in them.
    """
    if source.startswith(PREFIX):
        return HubImages(source, columns)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data.source: {source} does not exist; give {FORMS}")
    if path.is_file():
        return _file(path, source, columns)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return HubImages(str(path), columns)
    packed = files_below(path, COMPRESSED)
    if packed:
        _refuse_compressed(packed[0])
    archives, found = files_below(path, (".tar",)), files_below(path, (".parquet",))
    lists = tuple(file for file in files_below(path, tuple(METADATA)) if file.name.lower() in METADATA)
    tables = tuple(table for table in found if table not in lists and not _is_list(table))
    images = files_below(path, SUFFIXES) or (() if archives or tables else files_below(path, OTHER_SUFFIXES))
    there = {".tar": archives, ".parquet": tables, "image": images or lists}
    kinds = [kind for kind, found in there.items() if found]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(there[kind]):,} {kind} files" for kind in kinds)
        raise ValueError(f"data.source: {source} holds {counts}; name a folder with one kind of them")
    if len({file.parent for file in lists}) < len(lists):
        several = [file.name for file in lists if sum(other.parent == file.parent for other in lists) > 1]
        raise ValueError(f"data.source: {source} holds {' and '.join(several)} in one folder; keep one of them")
    if archives:
        beside = tuple(Ignored(str(table.relative_to(path)), LIST_OF_ARCHIVE) for table in found)
        return TarImages(archives, columns, beside)
    if tables:
        return ParquetImages(tables, columns)
    if images or lists:
        return FolderImages(path, columns)
    raise ValueError(f"data.source: {source} holds no image, no .tar and no .parquet file; see docs/data.md")


def _is_list(table: Path) -> bool:
    """True for the table that img2dataset writes beside each archive or folder of images."""
    return (table.with_suffix(".tar").exists() or table.with_suffix("").is_dir()) and not holds_images(table)


def _file(path: Path, source: str, columns: Columns) -> ImageFormat:
    if path.suffix.lower() == ".tar":
        return TarImages((path,), columns)
    if path.suffix.lower() == ".parquet":
        return ParquetImages((path,), columns)
    if path.name.lower().endswith(COMPRESSED):
        _refuse_compressed(path)
    if path.name.lower() in METADATA:
        raise ValueError(f"data.source: {source} is a list of images; name its folder")
    raise ValueError(
        f"data.source: {source} is no .tar and no .parquet file; a list of images and captions is read from their folder, under the name "
        f"{' or '.join(METADATA)}; prompts (.txt, .jsonl, .parquet) belong in data.prompts. "
        "Without images of your own let the teacher draw some: flashdmd data PROMPTS --teacher-images N --config CONFIG --out DIR"
    )


def _refuse_compressed(path: Path) -> None:
    raise ValueError(f"data.source: {path} is compressed, so samples cannot be read by position; {_unpack(path)}")


def _unpack(path: Path) -> str:
    name = path.name.lower()
    for ends, program in (
        ((".tar.gz", ".tgz"), "gunzip"),
        ((".tar.bz2",), "bunzip2"),
        ((".tar.xz",), "unxz"),
        ((".tar.zst",), "unzstd"),
    ):
        if name.endswith(ends):
            return f"unpack it to a plain .tar ({program} {path})"
    return "unpack it to a folder"


def open_prompts(source: str, columns: Columns, key: str = "data.prompts") -> TextFormat:
    """The format of prompts at `source`: a .txt or .jsonl file, also packed as .gz, a .parquet file, or a folder of .parquet.

    Raises ValueError, naming the `key` of the configuration.
    """
    path = Path(source)
    if path.is_dir() and (tables := files_below(path, (".parquet",))):
        return ParquetPrompts(tables, columns)
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {source}; give a .txt, .jsonl or .parquet file")
    if path.name.lower().endswith(PROMPTS):
        is_text = path.name.lower().removesuffix(".gz").endswith(".txt")
        return TextPrompts(path) if is_text else JsonPrompts(path, columns)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return ParquetPrompts((path,), columns)
    remedy = "; unpack it" if suffix in (".zst", ".bz2", ".xz", ".zip") else ""
    raise ValueError(f"{key}: {source} is no .txt, .jsonl or .parquet file{remedy}")
