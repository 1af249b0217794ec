"""The formats of data sets, and how a source says which one it is."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.data.formats.base import Columns, ImageFormat, TextFormat
from flashdmd_ray.data.formats.folder import METADATA, FolderImages
from flashdmd_ray.data.formats.hub import PREFIX, HubImages
from flashdmd_ray.data.formats.names import files_below
from flashdmd_ray.data.formats.parquet import ParquetImages
from flashdmd_ray.data.formats.prompts import JsonPrompts, ParquetPrompts, TextPrompts
from flashdmd_ray.data.formats.tar import TarImages
from flashdmd_ray.data.pixels import SUFFIXES

__all__ = ["Columns", "ImageFormat", "TextFormat", "open_images", "open_prompts"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")
FORMS = "a .tar or .parquet file, a folder of them, a folder of images, or hf:owner/name"


def open_images(source: str, columns: Columns) -> ImageFormat:
    """The format of captioned images at `source`; reads no sample. Raises ValueError, one line, when there is none.

    A .tar or .parquet file, a folder of them, a folder of images with metadata.jsonl, metadata.csv or a .txt beside each, a folder
    written by `save_to_disk`, or hf:owner/name[:split].
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
    archives, tables = files_below(path, (".tar",)), files_below(path, (".parquet",))
    images, lists = files_below(path, SUFFIXES), files_below(path, tuple(METADATA))
    there = {".tar": archives, ".parquet": tables, "image": images or lists}
    kinds = [kind for kind, found in there.items() if found]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(there[kind]):,} {kind} files" for kind in kinds)
        raise ValueError(f"data.source: {source} holds {counts}; name a folder with one kind of them")
    if len({file.parent for file in lists}) < len(lists):
        raise ValueError(f"data.source: {source} holds {' and '.join(METADATA)} in one folder; keep one of them")
    if archives:
        return TarImages(archives, columns)
    if tables:
        return ParquetImages(tables, columns)
    if images or lists:
        return FolderImages(path, columns)
    raise ValueError(f"data.source: {source} holds no image, no .tar and no .parquet file; see docs/data.md")


def _file(path: Path, source: str, columns: Columns) -> ImageFormat:
    if path.suffix.lower() == ".tar":
        return TarImages((path,), columns)
    if path.suffix.lower() == ".parquet":
        return ParquetImages((path,), columns)
    if path.name.lower().endswith(COMPRESSED):
        _refuse_compressed(path)
    if path.name in METADATA:
        raise ValueError(f"data.source: {source} is a list of images; name its folder")
    raise ValueError(
        f"data.source: {source} is no .tar and no .parquet file; prompts alone belong in data.prompts (.txt, .jsonl, .parquet)"
    )


def _refuse_compressed(path: Path) -> None:
    raise ValueError(
        f"data.source: {path} is compressed, so samples cannot be read by position; unpack it to a plain .tar or a folder"
    )


def open_prompts(source: str, columns: Columns, key: str = "data.prompts") -> TextFormat:
    """The format of prompts at `source`: a .txt, .jsonl or .parquet file, or a folder of .parquet.

    Raises ValueError, naming the `key` of the configuration.
    """
    path = Path(source)
    if path.is_dir() and (tables := files_below(path, (".parquet",))):
        return ParquetPrompts(tables, columns)
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {source}; give a .txt, .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return TextPrompts(path)
    if suffix in (".jsonl", ".ndjson"):
        return JsonPrompts(path, columns)
    if suffix == ".parquet":
        return ParquetPrompts((path,), columns)
    remedy = "; unpack it" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
    raise ValueError(f"{key}: {source} is no .txt, .jsonl or .parquet file{remedy}")
