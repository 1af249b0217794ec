"""Model files before anything is loaded: are they there, are they whole, how many parameters do they hold?

Reads only JSON and the headers of safetensors files, so that a wrong path or a truncated download is an error of the first second and
`--dry-run` can count the parameters of a 10 GB pipeline at once. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flashdmd_ray.catalog.families import FAMILIES, FamilyEntry, latent_size
from flashdmd_ray.catalog.rewards import is_published
from flashdmd_ray.config import Config, ModelConfig, RewardConfig
from flashdmd_ray.demo import weights_path

LONGEST_HEADER = 100 * 2**20
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DENOISER, VAE = "denoiser", "vae"
"""Parts of `teacher_files`; the text encoders are called as their folders."""
ORIGINAL_DENOISER, ORIGINAL_VAE = ("model.diffusion_model.",), ("first_stage_model.", "vae.")
"""How their weights start in a single file of the original layout."""


class NamesModels(Protocol):
    """A configuration that names a teacher and rewards: of joint training, or of a latent reward's."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def rewards(self) -> tuple[RewardConfig, ...]: ...


@dataclass(frozen=True)
class ModelFiles:
    """One pretrained model. root: where its files lie; None for a hub repository that is not on this machine.

    parameters: by part ('' for a model of one part); empty when only loading can tell.
    """

    source: str
    root: Path | None = None
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int | None:
        return sum(self.parameters.values()) if self.parameters else None


def teacher_files(config: NamesModels) -> ModelFiles:
    """The teacher: a pipeline or a single file, with another VAE where one is named. parameters: "denoiser", "vae" and the
    text encoders that will be loaded. Raises ValueError, one line, naming the key, the file and the remedy."""
    model, family = config.model, FAMILIES[config.model.family]
    encoders = {**family.text_encoders, **(family.optional_encoders if model.t5 else {})}
    if model.teacher.endswith(".safetensors"):
        files = _single_file(model, family, encoders)
    else:
        files = _pipeline(model, family, encoders)
    if model.vae is None:
        return files
    keys = {"config.json": ("block_out_channels", "latent_channels")}
    vae = inspect_model("model.vae", model.vae, None, ("",), keys)
    known = files.parameters and vae.parameters
    parameters = {**files.parameters, VAE: vae.parameters[""]} if known else {}
    return ModelFiles(files.source, files.root, parameters)


def _pipeline(model: ModelConfig, family: FamilyEntry, encoders: Mapping[str, str]) -> ModelFiles:
    own_vae = [] if model.vae else [VAE]
    files = inspect_model(
        "model.teacher", model.teacher, family.demo, (family.denoiser, *own_vae, *encoders), _pipeline_json(family)
    )
    if files.root is None:
        return files
    _check_pipeline("model.teacher", files.root, files.source, model, family)
    index = read_json(files.root / "model_index.json")
    for folder in family.optional_encoders if model.t5 else ():
        if not (index.get(folder) or [None])[0]:
            raise ValueError(f"model.t5: {files.source} has no {folder}; set it to false")
    parameters = {DENOISER if part == family.denoiser else part: n for part, n in files.parameters.items()}
    return ModelFiles(files.source, files.root, parameters)


def _single_file(model: ModelConfig, family: FamilyEntry, encoders: Mapping[str, str]) -> ModelFiles:
    path = Path(model.teacher)
    if not path.is_file():
        raise ValueError(f"model.teacher: no such file: {path}; correct the path or download it")
    try:
        sizes = header_sizes(path)
    except ValueError as error:
        raise ValueError(f"model.teacher: {error}") from None
    starts = {DENOISER: ORIGINAL_DENOISER, VAE: ORIGINAL_VAE} | {part: (start,) for part, start in encoders.items()}
    if model.vae:
        del starts[VAE]
    parameters = {part: sum(n for name, n in sizes.items() if name.startswith(s)) for part, s in starts.items()}
    for part, count in parameters.items():
        if not count:
            raise ValueError(
                f"model.teacher: {path} holds no {part} of family '{model.family}' (no weight starts with {starts[part][0]!r}); "
                "choose a file that does, or a pipeline directory"
            )
    if model.teacher_config is not None:
        key = "model.teacher_config"
        configs = inspect_model(key, model.teacher_config, None, (), _pipeline_json(family))
        if configs.root is not None:
            _check_pipeline(key, configs.root, configs.source, model, family)
    return ModelFiles(str(path), path.parent, parameters)


def _pipeline_json(family: FamilyEntry) -> dict[str, Sequence[str]]:
    """JSON files of a pipeline and the keys that they must have."""
    return {
        "model_index.json": ("_class_name",),
        "scheduler/scheduler_config.json": (),
        f"{family.denoiser}/config.json": ("sample_size", "in_channels"),
        "vae/config.json": ("block_out_channels",),
    }


def _check_pipeline(key: str, root: Path, name: str, model: ModelConfig, family: FamilyEntry) -> None:
    """Raises ValueError when the pipeline is of another class, or cannot make images of `model.resolution`."""
    found = read_json(root / "model_index.json")["_class_name"]
    if found != family.pipeline:
        raise ValueError(
            f"{key}: {name} holds a {found}, but model.family '{model.family}' is a {family.pipeline}; "
            "choose a teacher of that family"
        )
    latent_size(
        model.resolution, read_json(root / family.denoiser / "config.json"), read_json(root / VAE / "config.json")
    )


def read_json(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return tree


def sam_files(config: Config) -> ModelFiles:
    """The Segment Anything checkpoint of the discriminator. Raises ValueError like `teacher_files`."""
    path = Path(config.model.sam)
    if path.suffix in (".pth", ".pt"):
        if not path.is_file():
            raise ValueError(f"model.sam: {path} does not exist; correct the path or download the checkpoint")
        floats = path.stat().st_size // 4  # an official checkpoint is float32 weights and nothing else
        return ModelFiles(str(path), path.parent, {"": floats})
    return inspect_model("model.sam", config.model.sam, "sam", ("",), {})


def inspect_model(
    key: str, source: str, demo_part: str | None, parts: Sequence[str], json_files: Mapping[str, Sequence[str]]
) -> ModelFiles:
    """demo_part: None where 'demo' means nothing. Raises ValueError, naming the configuration `key`, when weights, a config.json or
    another JSON file is missing or damaged."""
    if source == "demo" and demo_part is not None:
        root, name = weights_path(demo_part), "demo weights"
    elif Path(source).is_dir():
        root, name = Path(source), source
    else:
        snapshot = local_snapshot(key, source, "" if demo_part is None else ", or use 'demo'")
        if snapshot is None:
            return ModelFiles(source)
        root, name = snapshot, source
    try:
        for file, keys in json_files.items():
            check_json(root / file, keys)
        for part in parts:
            check_json(root / part / "config.json")
        return ModelFiles(name, root, {part: count_parameters(root / part) for part in parts})
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def local_snapshot(key: str, source: str, instead: str) -> Path | None:
    """The local copy of a hub repository; None when there is none but the hub, or `published`, knows it. Raises ValueError otherwise."""
    if not HUB_ID.fullmatch(source) or source.startswith("."):
        raise ValueError(f"{key}: no such directory: {source!r}; correct the path{instead}")
    from huggingface_hub import HfApi, constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir() and (known := sorted(snapshots.iterdir(), key=os.path.getmtime)):
        return known[-1]
    if is_published(source):
        return None
    try:
        HfApi().model_info(source, timeout=10)
    except Exception as error:  # offline, unknown, gated, no network: all mean that it cannot be had
        raise ValueError(
            f"{key}: {source} is neither a directory nor a hub repository that can be reached ({type(error).__name__}); "
            "correct the path or download it"
        ) from None
    return None


def check_json(path: Path, keys: Sequence[str] = ()) -> None:
    """Raises ValueError when a JSON file is missing, is no JSON object, or lacks a key."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} is missing; download or make the model again") from None
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is damaged (no JSON object); download or make the model again")
    for key in keys:
        if key not in tree:
            raise ValueError(
                f"{path} lacks '{key}': it is damaged or describes another kind of model; choose another path"
            )


def count_parameters(folder: Path) -> int:
    """Parameters in the weights of one model folder; of several variants (fp16, ...) the plain one. Raises ValueError without weights."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1] or files
    shards = [file for file in plain if re.search(r"-\d{5}-of-\d{5}$", file.stem)]
    if not plain:
        raise ValueError(f"{folder} has no .safetensors file; download the weights, or convert them")
    return sum(read_header(file) for file in shards or plain[:1])


def read_header(path: Path) -> int:
    """The number of parameters in a safetensors file. Raises ValueError as `header_sizes` does."""
    return sum(header_sizes(path).values())


def header_sizes(path: Path) -> dict[str, int]:
    """The number of parameters of each tensor in a safetensors file, from its header.

    Raises ValueError when the header is unreadable or the file's size contradicts it.
    """
    damaged = ValueError(f"{path} is damaged (not a complete safetensors file); download or make it again")
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for entry in tensors.values())
        sizes = {name: math.prod(entry["shape"]) for name, entry in tensors.items()}
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); correct its permissions or make it again"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise damaged from None
    if path.stat().st_size != 8 + length + end:
        raise damaged
    return sizes
