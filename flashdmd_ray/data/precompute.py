"""Making text embeddings and latents before a run; `precomputed` reads them. See docs/data.md."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashdmd_ray.batch import from_uint8
from flashdmd_ray.config import DataConfig, ModelConfig
from flashdmd_ray.data.build import open_image_reader, open_prompt_index
from flashdmd_ray.data.executor import Executor, ranges
from flashdmd_ray.data.manifest import FORMAT, MANIFEST, Key
from flashdmd_ray.data.precomputed import embedding_key, latent_key, text_digest
from flashdmd_ray.run.files import new_file, write_atomically

if TYPE_CHECKING:
    from flashdmd_ray.models.family import Family

ROWS = 256
"""Rows of a shard: some 160 MB of SDXL's embeddings, 70 MB of its latents."""
TOGETHER = 8
"""Images that the VAE encodes at a time, the last group padded: one shape, so that a latent does not depend on its neighbours."""


class Embedding:
    """Encodes a range of the distinct prompts and writes a shard."""

    def __init__(self, data: DataConfig, model: ModelConfig, family: Family, out: Path) -> None:
        self.texts = distinct_texts(data)
        self.family = family
        self.out = out
        self.key = embedding_key(family, model)

    def __call__(self, bounds: tuple[int, int]) -> dict[str, Any]:
        texts = self.texts[slice(*bounds)]
        file = self.out / f"embeddings-{bounds[0]:09}.safetensors"
        if not _is_written(file, self.key):
            dtype = next(self.family.text.parameters()).dtype
            columns = [column.to(dtype) for column in self.family.text(texts)]
            tensors = {str(number): column for number, column in enumerate(columns)}
            _write(file, tensors | {"digests": torch.tensor([text_digest(text) for text in texts])}, self.key)
        return {"file": file.name, "rows": len(texts)}


class Encoding:
    """Decodes a range of the real images, encodes them and writes a shard."""

    def __init__(self, data: DataConfig, model: ModelConfig, family: Family, out: Path) -> None:
        self.images = open_image_reader(data, seed=0)
        self.family = family
        self.out = out
        self.key = latent_key(family, model, self.images.index.content)

    def __call__(self, bounds: tuple[int, int]) -> dict[str, Any]:
        file = self.out / f"latents-{bounds[0]:09}.safetensors"
        if not _is_written(file, self.key):
            latents, samples = [], []
            for start in range(*bounds, TOGETHER):
                numbers = range(start, min(start + TOGETHER, bounds[1]))
                decoded = [self.images.find(number, self.family.image_size) for number in numbers]
                pixels = from_uint8(torch.stack([torch.tensor(d.pixels).permute(2, 0, 1) for d in decoded]))
                padded = torch.cat([pixels, pixels[:1].expand(TOGETHER - len(pixels), -1, -1, -1)])
                latents.append(self.family.encode_images(padded)[: len(decoded)])
                samples += [d.sample for d in decoded]
            _write(file, {"latents": torch.cat(latents), "samples": torch.tensor(samples)}, self.key)
        return {"file": file.name, "rows": bounds[1] - bounds[0]}


def precompute(what: str, data: DataConfig, model: ModelConfig, out: Path, executor: Executor, load: Any) -> Path:
    """Write the shards of `what` ("embeddings" or "latents") and then their manifest under `out`; returns the folder.

    Shards that are there are kept.

    load(model, parts): the family, called once per process. Raises ValueError for unusable data or another folder's key.
    """
    folder = out / what
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    count = len(distinct_texts(data)) if what == "embeddings" else len(open_image_reader(data, seed=0))
    shards = list(executor(partial(_worker, what, data, model, folder, load), ranges(count, ROWS), 1))
    family = load(model, _PARTS[what])
    content = "" if what == "embeddings" else open_image_reader(data, seed=0).index.content
    key = embedding_key(family, model) if what == "embeddings" else latent_key(family, model, content)
    manifest = {"format": FORMAT, "key": key, "rows": count, "shards": shards}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return folder


_PARTS = {"embeddings": ("text",), "latents": ("vae",)}


def _worker(what: str, data: DataConfig, model: ModelConfig, folder: Path, load: Any) -> Embedding | Encoding:
    kind = Embedding if what == "embeddings" else Encoding
    return kind(data, model, load(model, _PARTS[what]), folder)


def distinct_texts(data: DataConfig) -> list[str]:
    """Every text a run can ask for: prompts, captions of the real images, and the empty one of guidance; each once."""
    texts: dict[str, None] = {"": None}
    prompts = open_prompt_index(data)
    if prompts is not None:
        texts |= dict.fromkeys(prompts.captions(range(len(prompts))))
    if data.source != "demo":
        index = open_image_reader(data, seed=0).index
        texts |= dict.fromkeys(index.captions(range(len(index))))
    return list(texts)


def _is_written(file: Path, key: Key) -> bool:
    """Return True if an earlier call wrote this shard for the same key."""
    try:
        with safe_open(file, framework="pt") as shard:
            return bool(shard.metadata() == {"key": json.dumps(key)})
    except (OSError, SafetensorError):
        return False


def _write(file: Path, tensors: dict[str, Tensor], key: Key) -> None:
    with new_file(file) as unfinished:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, unfinished, {"key": json.dumps(key)})
