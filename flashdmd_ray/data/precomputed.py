"""Text embeddings and latents computed before a run: safetensors shards beside a manifest that is written last.

The manifest says what they were made with. A run whose model, weights, resolution or data differ refuses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.config import DataConfig, ModelConfig

if TYPE_CHECKING:
    from flashdmd_ray.models.family import Family


import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
Key = Mapping[str, Any]


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
        _check_key(manifest["key"], key, folder, setting)
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
            path = self._folder / self._files[shard]
            try:
                self._open[shard] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} is missing or damaged ({type(error).__name__}); precompute it again"
                ) from None
        return self._open[shard]


def read_manifest(folder: Path, setting: str) -> dict[str, Any]:
    """Raises ValueError when there is none, it cannot be read or it names files outside the folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest["key"], dict)
        known = known and all(e["rows"] >= 0 and Path(e["file"]).name == e["file"] for e in manifest["shards"])
    except OSError:
        raise ValueError(
            f"{setting}: {folder} has no {MANIFEST}; precompute with flashdmd data, or let it finish"
        ) from None
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{setting}: {folder / MANIFEST} cannot be read; precompute again") from None
    return dict(manifest)


def _check_key(found: Key, wanted: Key, folder: Path, setting: str) -> None:
    different = [
        f"{name} is {found.get(name)} and the run's {wanted.get(name)}"
        for name in dict.fromkeys([*wanted, *found])
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"{setting}: {folder} was computed for something else ({'; '.join(different)}); precompute again, or set it to null"
        )


def embedding_key(family: Family, model: ModelConfig) -> Key:
    """Facts that text embeddings depend on. revision: the digest of the encoders' weights."""
    return {
        "kind": "embeddings",
        "family": model.family,
        "model": model.teacher,
        "revision": checksum(family.text.state_dict()),
    }


def latent_key(family: Family, model: ModelConfig, content: str) -> Key:
    """Facts that latents depend on: weights of the VAE, size of the images, and `content`, the digest of the data set."""
    return {
        "kind": "latents",
        "family": model.family,
        "model": model.vae or model.teacher,
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
