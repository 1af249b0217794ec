"""The formats of data sets, and how a source says which one it is."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.data.formats.base import Columns, ImageFormat, TextFormat
from flashdmd_ray.data.formats.folder import METADATA, FolderImages
from flashdmd_ray.data.formats.hub import PREFIX, HubImages
from flashdmd_ray.data.formats.parquet import ParquetImages
from flashdmd_ray.data.formats.prompts import JsonPrompts, ParquetPrompts, TextPrompts
from flashdmd_ray.data.formats.tar import TarImages

__all__ = ["Columns", "ImageFormat", "TextFormat", "open_images", "open_prompts"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(source: str, columns: Columns) -> ImageFormat:
    """The format of captioned images at `source`; reads no sample. Raises ValueError, one line, when there is none.

    A .tar or .parquet file, a folder of them, an image folder with metadata.jsonl, a folder written by `save_to_disk`,
    or hf:owner/name[:split].
    """
    if source.startswith(PREFIX):
        return HubImages(source, columns)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"data.source: {source} does not exist; give a .tar, .parquet, a folder or hf:owner/name")
    if path.is_file():
        return _file(path, source, columns)
    if (path / METADATA).is_file():
        return FolderImages(path, columns)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return HubImages(str(path), columns)
    if archives := tuple(sorted(path.glob("*.tar"))):
        return TarImages(archives, columns)
    if tables := tuple(sorted(path.rglob("*.parquet"))):
        return ParquetImages(tables, columns)
    _refuse_compressed([p.name for p in path.iterdir()], source)
    raise ValueError(f"data.source: {source} holds no {METADATA}, no .tar and no .parquet file; see docs/data.md")


def _file(path: Path, source: str, columns: Columns) -> ImageFormat:
    if path.suffix == ".tar":
        return TarImages((path,), columns)
    if path.suffix == ".parquet":
        return ParquetImages((path,), columns)
    _refuse_compressed([path.name], source)
    raise ValueError(
        f"data.source: {source} is no .tar and no .parquet file; prompts alone belong in data.prompts (.txt, .jsonl, .parquet)"
    )


def _refuse_compressed(names: list[str], source: str) -> None:
    if any(name.endswith(COMPRESSED) for name in names):
        raise ValueError(
            f"data.source: {source} is compressed, so samples cannot be read by position; unpack it to a plain .tar"
        )


def open_prompts(source: str, columns: Columns, key: str = "data.prompts") -> TextFormat:
    """The format of prompts at `source`: a .txt, .jsonl or .parquet file, or a folder of .parquet.

    Raises ValueError, naming the `key` of the configuration.
    """
    path = Path(source)
    if path.is_dir() and (tables := tuple(sorted(path.rglob("*.parquet")))):
        return ParquetPrompts(tables, columns)
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {source}; give a .txt, .jsonl or .parquet file")
    if path.suffix == ".txt":
        return TextPrompts(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonPrompts(path, columns)
    if path.suffix == ".parquet":
        return ParquetPrompts((path,), columns)
    raise ValueError(f"{key}: {source} is no .txt, .jsonl or .parquet file")
