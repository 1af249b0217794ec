"""Small real data sets in every format: digit scenes of the project, encoded and written as anyone would."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flashdmd_ray.demo.scenes import render, sample_scenes

Captioned = tuple[str, bytes]


def pictures(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """(caption, 24x24 RGB image)."""
    scenes = sample_scenes(count, "train", seed)
    pixels = ((render(scenes)[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [(scene.caption, Image.fromarray(image)) for scene, image in zip(scenes, pixels, strict=True)]


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def samples(count: int, seed: int = 0) -> list[Captioned]:
    return [(caption, encoded(image)) for caption, image in pictures(count, seed)]


def write_folder(root: Path, data: Sequence[Captioned], lines: Iterable[object] = ()) -> Path:
    """lines: more lines of metadata.jsonl; what is no text is written as JSON."""
    root.mkdir(parents=True)
    rows: list[object] = []
    for number, (caption, image) in enumerate(data):
        (root / f"{number:03}.png").write_bytes(image)
        rows.append({"file_name": f"{number:03}.png", "text": caption})
    text = [row if isinstance(row, str) else json.dumps(row) for row in [*rows, *lines]]
    (root / "metadata.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_members(data: Sequence[Captioned], first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for number, (caption, image) in enumerate(data, first)
        for member in ((f"{number:05}.png", image), (f"{number:05}.txt", caption.encode()))
    ]


def write_tars(root: Path, data: Sequence[Captioned], each: int) -> Path:
    for start in range(0, len(data), each):
        write_tar(root / f"{start // each:05}.tar", tar_members(data[start : start + each], start))
    return root


def write_parquet(root: Path, data: Sequence[Captioned], group: int) -> Path:
    """As Hugging Face writes images: a column of {bytes, path}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    half = len(data) // 2
    for name, part in (("a", data[:half]), ("b", data[half:])):
        rows = [{"image": {"bytes": image, "path": None}, "text": caption} for caption, image in part]
        pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet", row_group_size=group)
    return root


def write_hub(root: Path, data: Sequence[Captioned]) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": image, "path": None} for _, image in data], "text": [caption for caption, _ in data]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(root)
    return root


def as_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)
