"""Text embeddings and latents computed before a run: safetensors shards beside a manifest that is written last.

The manifest says what they were made with. A run whose model, weights, resolution or data differ refuses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.config import DataConfig, ModelConfig
from flashdmd_ray.data.manifest import Key, check_key, known_facts, open_shard, read_manifest

if TYPE_CHECKING:
    from flashdmd_ray.models.family import Family


import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def text_digest(text: str) -> int:
    """Key of a stored embedding: 63 bits of the text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class StoredEmbeddings:
    """Text embeddings by text. Call it with texts: the rows of those it has."""

    def __init__(self, folder: Path, key: Key) -> None:
        """Raises ValueError when the folder is incomplete or its key is not `key`."""
        self._shards = _Shards(folder, "data.embeddings", key)
        digests = [self._shards.tensor(shard, "digests") for shard in range(len(self._shards))]
        flat = torch.cat(digests).numpy()
        self._order = np.argsort(flat)
        self._sorted = flat[self._order]

    def __call__(self, texts: Sequence[str]) -> dict[str, tuple[Tensor, ...]]:
        """For every stored text, the tensors of the family's cache (one row each, as its encoders made them)."""
        found = {}
        for text in texts:
            digest = text_digest(text)
            at = int(np.searchsorted(self._sorted, digest))
            if at < len(self._sorted) and self._sorted[at] == digest:
                shard, row = self._shards.locate(int(self._order[at]))
                found[text] = self._shards.numbered(shard, row)
        return found


class StoredLatents:
    """Latents of the real images by sample number."""

    def __init__(self, folder: Path, key: Key) -> None:
        """Raises ValueError when the folder is incomplete or its key is not `key`."""
        self._shards = _Shards(folder, "data.latents", key)

    def rows(self, samples: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Latents float32 (B, C, h, w) of `samples`, and the samples they are of: another one where one was bad."""
        values, actual = [], []
        for number in samples:
            shard, row = self._shards.locate(number)
            values.append(self._shards.row(shard, "latents", row).float())
            actual.append(int(self._shards.row(shard, "samples", row)))
        return torch.stack(values), actual


class _Shards:
    """Row access to the tensors of a folder of shards; only the rows asked for are read."""

    def __init__(self, folder: Path, setting: str, key: Key) -> None:
        manifest = read_manifest(folder, setting)
        check_key(manifest["key"], key, folder, setting)
        self._folder = folder
        self._files = [entry["file"] for entry in manifest["shards"]]
        sizes = [entry["rows"] for entry in manifest["shards"]]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._open: dict[int, Any] = {}
        for shard in range(len(self)):  # a missing or cut shard is an error of the start
            self._file(shard)

    def __len__(self) -> int:
        return len(self._files)

    def locate(self, row: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, row) - 1
        return shard, row - self._starts[shard]

    def tensor(self, shard: int, name: str) -> Tensor:
        return self._file(shard).get_tensor(name)

    def row(self, shard: int, name: str, row: int) -> Tensor:
        return self._file(shard).get_slice(name)[row : row + 1][0]

    def numbered(self, shard: int, row: int) -> tuple[Tensor, ...]:
        """Row `row` of the tensors called 0, 1, 2, ..."""
        names = sorted((name for name in self._file(shard).keys() if name.isdigit()), key=int)  # noqa: SIM118 (no mapping)
        return tuple(self.row(shard, name, row) for name in names)

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = open_shard(self._folder / self._files[shard], "pt")
        return self._open[shard]


def embedding_key(family: Family, model: ModelConfig) -> Key:
    """Facts that text embeddings depend on. revision: the digest of the encoders' weights."""
    return {**known_facts("embeddings", model), "revision": checksum(family.text.state_dict())}


def latent_key(family: Family, model: ModelConfig, content: str) -> Key:
    """Facts that latents depend on: weights of the VAE, size of the images, and `content`, the digest of the data set."""
    return {
        **known_facts("latents", model),
        "revision": checksum(family.vae.state_dict()),
        "resolution": list(family.image_size),
        "data": content,
    }


def use_embeddings(family: Family, data: DataConfig, model: ModelConfig) -> None:
    """Let the family look prompts up before it encodes them. Raises ValueError when they were made for something else."""
    if data.embeddings is not None:
        family.text.stored = StoredEmbeddings(data.embeddings, embedding_key(family, model))


def open_latents(folder: Path, family: Family, model: ModelConfig, content: str) -> StoredLatents:
    """Latents of the real images. Raises ValueError when they were made for something else."""
    return StoredLatents(folder, latent_key(family, model, content))
