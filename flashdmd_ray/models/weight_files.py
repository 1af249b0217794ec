"""Which files of a folder hold its weights: the plain ones, or the one variant that is there, whole or in shards. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from flashdmd_ray.models.headers import Header, ModelFileError, read_header, refuse_wrapper

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""How the weights of a diffusers and of a transformers module are called in its folder."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that make up the weights of one module. variant: such as "fp16", as the libraries' loaders call it."""

    headers: tuple[Header, ...]
    variant: str | None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of values of each tensor."""
        return {name: size for header in self.headers for name, size in header.sizes.items()}


@dataclass(frozen=True)
class Choice:
    """file: the weights, or the index that names their shards."""

    file: str
    variant: str | None

    @property
    def is_index(self) -> bool:
        return self.file.endswith(".json")


def weight_files(folder: Path, stem: str) -> WeightFiles:
    """The weights in `folder`. Raises ModelFileError when a file of them is missing, damaged or not usable."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    choice = choose(names, stem, str(folder))
    files = shards(folder / choice.file) if choice.is_index else [choice.file]
    headers = tuple(read_header(folder / file) for file in files)
    found = WeightFiles(headers, choice.variant)
    if choice.is_index:
        _check_index(folder / choice.file, found.sizes)
    refuse_wrapper(folder / choice.file, found.sizes, several_parts=stem == DIFFUSERS)
    return found


def _check_index(index: Path, present: Collection[str]) -> None:
    """Raises ModelFileError unless the shards hold the very weights that their index lists: loaders go by the index."""
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if differing := sorted(set(listed) ^ set(present)):
        has, lacks = (
            ("it lists", "no shard has it") if differing[0] in listed else ("a shard has", "it does not list it")
        )
        raise ModelFileError(
            f"{index} and its shards are not of one model: {has} {differing[0]!r}, {lacks} ({len(differing)} such weights); "
            "download the model again"
        )


def choose(names: Collection[str], stem: str, folder: str) -> Choice:
    """The one of the file `names` of `folder` that says where the weights are: what diffusers and transformers would open.

    Plain weights come first. Without them the only variant is taken. Raises ModelFileError when there are none, or several.
    """
    pattern = rf"{stem}(?:\.(?P<file>[\w-]+))?\.safetensors|{stem}\.safetensors\.index(?:\.(?P<index>[\w-]+))?\.json"
    found: dict[str | None, list[str]] = {}
    for match in filter(None, (re.fullmatch(pattern, name) for name in sorted(names))):
        variant = match["file"] or match["index"]
        if not _is_shard(variant):
            found.setdefault(variant, []).append(match[0])
    variants = [None] if None in found else list(found)
    if len(variants) > 1:
        raise ModelFileError(
            f"{folder} holds the variants {' and '.join(map(str, variants))} of the weights and no plain ones; keep one of them"
        )
    if not variants:
        raise ModelFileError(_nothing(names, stem, folder))
    files = found[variants[0]]
    # With both, diffusers opens the index and transformers the whole file.
    prefers_index = stem == DIFFUSERS
    return Choice(min(files, key=lambda name: name.endswith(".json") != prefers_index), variants[0])


def _is_shard(variant: str | None) -> bool:
    return variant is not None and re.search(r"-\d{5}-of-\d{5}$", variant) is not None


def _nothing(names: Collection[str], stem: str, folder: str) -> str:
    safetensors = sorted(name for name in names if name.endswith(".safetensors"))
    if any(name.startswith(stem) for name in safetensors):
        return f"{folder} holds shards such as {safetensors[0]}, but not {stem}.safetensors.index.json; download it"
    if safetensors:
        return f"{folder} holds {safetensors[0]}, but no {stem}.safetensors; rename it if it is that, or download the weights"
    pickled = sorted(
        name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".onnx"))
    )
    if pickled:
        return f"{folder} has no .safetensors file, only {pickled[0]}, which is not read; download the safetensors weights, or convert it"
    return f"{folder} has no .safetensors file; download the weights, or convert them"


def shards(index: Path) -> list[str]:
    """The files that an index names. Raises ModelFileError when it is damaged or names a file that is missing."""
    try:
        weights: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weights.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelFileError(f"{index} is damaged (no index of shards); download or make it again") from None
    if not files or any(Path(file).name != file for file in files):
        raise ModelFileError(f"{index} is damaged (it names no files beside it); download or make it again")
    missing = [file for file in files if not (index.parent / file).exists()]
    if missing:
        raise ModelFileError(
            f"{index.parent / missing[0]} is missing ({len(missing)} of {len(files)} shards); download the model again"
        )
    return files
