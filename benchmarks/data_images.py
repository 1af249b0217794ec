"""Images per second through each way of decoding real images: `python benchmarks/data_images.py [--images N] [--out FILE]`.

512-pixel JPEG scenes in WebDataset archives, read in a run's order, cropped and resized to 256 pixels, in batches of 32
as a role takes them. Startup (a pool, Ray's workers) is measured apart.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIDE, SIZE, BATCH, KINDS = 512, (256, 256), 32, 64


def write_archives(folder: Path, count: int) -> None:
    """Archives of 200 samples: KINDS scenes with a little grain, as photographs have, again and again."""
    from PIL import Image

    from flashdmd_ray.demo.scenes import render, sample_scenes

    scenes = sample_scenes(KINDS, "train", 0)
    grain = np.random.default_rng(0).normal(0, 6, (SIDE, SIDE, 3))
    encoded = []
    for picture in render(scenes, canvas=SIDE)[0]:
        pixels = (picture.permute(1, 2, 0).numpy() + 1) * 127.5 + grain
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for start in range(0, count, 200):
        with tarfile.open(folder / f"{start:06}.tar", "w") as archive:
            for number in range(start, min(start + 200, count)):
                scene = scenes[number % KINDS]
                for suffix, content in (("jpg", encoded[number % KINDS]), ("txt", scene.caption.encode())):
                    info = tarfile.TarInfo(f"{number:06}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def batches(count: int) -> Iterator[range]:
    return (range(start, start + BATCH) for start in range(0, count - BATCH + 1, BATCH))


def measure(decoder: Any, count: int) -> dict[str, float]:
    """Seconds until the first three batches, then images per second, and CPU milliseconds of this process per image."""
    started = time.perf_counter()
    walk = batches(count)
    for _ in range(3):
        decoder.take(next(walk), SIZE)
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    for positions in walk:
        done += len(decoder.take(positions, SIZE))
    seconds = time.perf_counter() - begun
    return {
        "start_s": round(begun - started, 2),
        "images_per_s": round(done / seconds, 1),
        "cpu_ms_per_image_here": round(1000 * (time.process_time() - cpu) / done, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/data_images.json"))
    options = parser.parse_args()

    from flashdmd_ray.config import DataConfig
    from flashdmd_ray.data.build import open_image_reader
    from flashdmd_ray.data.prefetch import ThreadDecoder
    from flashdmd_ray.runtime.data_stream import RayDecoder, start_ray

    figures: dict[str, Any] = {"images": options.images, "from": SIDE, "to": SIZE[0], "batch": BATCH}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "archives"
        folder.mkdir()
        write_archives(folder, options.images)
        config = DataConfig(source=str(folder), cache=Path(name) / "cache")
        started = time.perf_counter()
        images = open_image_reader(config, 0)
        figures["index_images_per_s"] = round(options.images / (time.perf_counter() - started))
        for threads in (1, 2):
            figures[f"{threads} threads"] = measure(ThreadDecoder(images, threads, batches=2), options.images)
        cluster = start_ray()
        try:
            decoder = RayDecoder(config, images)
            figures["ray data, 2 workers"] = measure(decoder, options.images)
            decoder.close()
        finally:
            cluster.leave()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
