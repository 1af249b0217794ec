"""The teacher before anything is loaded: are the files there, whole, and of the kind that the configuration says?

Reads only JSON and the headers of safetensors files, so that a wrong path or a truncated download is an error of the first second and
`--dry-run` can count the parameters of a 10 GB pipeline at once. Which files are meant is decided by `locations` and `weight_files`, as
in the loaders. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FamilyEntry, latent_size
from flashdmd_ray.catalog.rewards import is_published
from flashdmd_ray.catalog.schedulers import forward_process
from flashdmd_ray.config import ModelConfig, RewardConfig
from flashdmd_ray.models.config_checks import check_network, check_same_latents, check_shape, check_vae
from flashdmd_ray.models.config_files import check_json, check_module, check_tokenizer, read_json
from flashdmd_ray.models.headers import Header, ModelFileError, stated_scheduler
from flashdmd_ray.models.locations import HubPath, explain, local, resolve
from flashdmd_ray.models.single_file import (
    DENOISER,
    VAE,
    part_size,
    read_single_file,
    refuse_contradiction,
    scheduler_of,
    teacher_starts,
    vae_file,
)
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, WeightFiles, weight_files


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


def inspect(key: str, path: str, demo: str | None, check: Callable[[Path], dict[str, int]]) -> ModelFiles:
    """The model at `path`, whose directory or file `check` counts the parameters of, by part.

    demo: the part of the demo weights that 'demo' means; None where it means nothing. What the hub still has to send is left to the loader.
    Raises ValueError naming the configuration `key`.
    """
    name = "demo weights" if path == "demo" and demo is not None else path
    place = local(resolve(path, demo))
    if place is None:
        _check_hub(key, path, "" if demo is None else ", or use 'demo'")
        return ModelFiles(name)
    try:
        return ModelFiles(name, place if place.is_dir() else place.parent, check(place))
    except ModelFileError as error:
        from huggingface_hub import constants

        incomplete = not Path(resolve(path, demo)).exists() and not constants.HF_HUB_OFFLINE
        if incomplete and _is_reachable(path):
            return ModelFiles(name)
        raise ValueError(f"{key}: {error}") from None


def _check_hub(key: str, path: str, instead: str) -> None:
    """Raises ValueError unless the path names a repository that is in the catalogue, or that the hub knows."""
    hub = HubPath.parse(path)
    if hub is None or Path(path).exists() or Path(path).is_symlink():
        raise ValueError(f"{key}: {explain(path)}{instead}")
    if is_published(hub.repository) or is_published(path):
        return
    if not _is_reachable(path):
        raise ValueError(
            f"{key}: {path} is neither a directory nor a hub repository that can be reached; correct the path or download it"
        )


def _is_reachable(path: str) -> bool:
    from huggingface_hub import HfApi

    hub = HubPath.parse(path)
    if hub is None:
        return False
    try:
        HfApi().model_info(hub.repository, revision=hub.revision, timeout=10)
    except Exception:  # offline, unknown, gated, no network: all mean that it cannot be had
        return False
    return True


def teacher_files(config: NamesModels) -> ModelFiles:
    """The teacher: a pipeline or a single file, with another VAE where one is named.

    parameters: of "denoiser", "vae" and the text encoders that will be loaded. Raises ValueError, one line, naming the key, the file and
    the remedy.
    """
    model = config.model
    if model.teacher.endswith(".safetensors"):
        files = _single_file(model)
    else:
        files = inspect("model.teacher", model.teacher, model.entry.demo, lambda root: _pipeline(model, root))
    if model.vae is None:
        return files
    denoiser, own = part_config(config, model.entry.denoiser) or {}, part_config(config, VAE)
    vae = inspect(
        "model.vae", model.vae, None, lambda place: _other_vae(place, model.entry, denoiser.get("in_channels"), own)
    )
    counted = files.parameters and vae.parameters
    return ModelFiles(files.source, files.root, {**files.parameters, **vae.parameters} if counted else {})


def part_config(config: NamesModels, folder: str) -> Mapping[str, Any] | None:
    """The config.json of that part of the teacher: in its directory, or as published; None when it is not on this machine."""
    model = config.model
    path = model.teacher_config or model.teacher
    root = local(resolve(path, model.entry.demo))
    file = None if root is None else root / folder / "config.json"
    if file is not None and file.is_file():
        return read_json(file)
    pipeline = published.PIPELINES.get(path)
    part = None if pipeline is None else pipeline.parts.get(folder)
    return None if part is None else part.config


def _encoders(model: ModelConfig) -> list[str]:
    return [*model.entry.text_encoders, *(model.entry.optional_encoders if model.t5 else ())]


def _pipeline(model: ModelConfig, root: Path) -> dict[str, int]:
    """Parameters by part of a pipeline directory, of which everything that will be loaded is looked at."""
    entry = model.entry
    if (root / "config.json").is_file() and not (root / "model_index.json").exists():
        raise ModelFileError(f"{root} holds one module; name the pipeline directory with its model_index.json")
    _check_configs(model, root)
    for name in _encoders(model):
        check_module(root / name / "config.json")
    files = {DENOISER: weight_files(root / entry.denoiser, DIFFUSERS)}
    if model.vae is None:
        files[VAE] = weight_files(root / VAE, DIFFUSERS)
    files |= {name: weight_files(root / name, TRANSFORMERS) for name in _encoders(model)}
    refuse_contradiction(read_json(root / "scheduler" / "scheduler_config.json"), files[DENOISER].headers[0])
    return {part: _count(weights) for part, weights in files.items()}


def _count(weights: WeightFiles) -> int:
    return sum(weights.sizes.values())


def _check_configs(model: ModelConfig, root: Path, header: Header | None = None) -> None:
    """Raises ModelFileError unless JSON files and tokenizers of a pipeline directory fit the family and the configuration.

    header: of the single file that they go with, which may state its scheduler itself.
    """
    entry = model.entry
    if not root.is_dir():
        raise ModelFileError(explain(str(root)))
    index = check_json(root / "model_index.json", ("_class_name",))
    if index["_class_name"] != entry.pipeline:
        raise ModelFileError(
            f"{root} holds a {index['_class_name']}, but model.family '{model.family}' is a {entry.pipeline}; "
            "choose a teacher of that family"
        )
    _refuse_absent(model, index, root)
    scheduler = check_json(root / "scheduler" / "scheduler_config.json")
    denoiser = check_module(root / entry.denoiser / "config.json", ("sample_size", "in_channels"), entry.network)
    encoders = {name: check_json(root / name / "config.json") for name in entry.text_encoders}
    check_network(denoiser, encoders, entry, root / entry.denoiser)
    if model.vae is None:
        vae = check_module(root / VAE / "config.json", ("block_out_channels",), "AutoencoderKL")
        check_vae(vae, entry, denoiser["in_channels"], str(root / VAE))
    else:
        vae = check_json(root / VAE / "config.json", ("block_out_channels",))
    check_shape(vae, root / VAE)
    try:
        forward_process(scheduler if header is None else scheduler_of(scheduler, header))
    except ModelFileError:
        raise
    except ValueError as error:
        raise ModelFileError(f"{root / 'scheduler' / 'scheduler_config.json'}: {error}") from None
    for name in _encoders(model):
        check_tokenizer(root / name.replace("text_encoder", "tokenizer"))
    latent_size(model.resolution, denoiser, vae)


def _refuse_absent(model: ModelConfig, index: Mapping[str, Any], root: Path) -> None:
    """Raises ModelFileError for a part that will be loaded and that the pipeline was saved without."""
    for name in [model.entry.denoiser, *([] if model.vae else [VAE]), *_encoders(model)]:
        optional = name in model.entry.optional_encoders
        if (name in index or optional) and not (index.get(name) or [None])[0]:
            raise ModelFileError(
                f"model.t5: {root} has no {name}; set it to false"
                if optional
                else f"{root} has no {name}; choose another"
            )


def _other_vae(
    place: Path, entry: FamilyEntry, channels: int | None, teacher: Mapping[str, Any] | None
) -> dict[str, int]:
    """Parameters of `model.vae`: a directory, or one .safetensors file."""
    if place.suffix == ".safetensors":
        header, own = vae_file(place)
        check_vae({"latent_channels": own}, entry, channels, str(place))
        return {VAE: part_size(header, ("",))}
    if not place.is_dir():
        raise ModelFileError(explain(str(place)))
    if (place / "model_index.json").is_file():
        raise ModelFileError(f"{place} is a pipeline; name its folder {VAE}")
    config = check_module(place / "config.json", ("block_out_channels", "latent_channels"), "AutoencoderKL")
    check_shape(config, place)
    check_vae(config, entry, channels, str(place))
    check_same_latents(config, teacher or {}, str(place))
    return {VAE: _count(weight_files(place, DIFFUSERS))}


def _single_file(model: ModelConfig) -> ModelFiles:
    path = Path(model.teacher)
    if not path.is_file():
        raise ValueError(f"model.teacher: no such file: {path}; correct the path or download it")
    try:
        header = read_single_file(path, model.entry)
        starts = teacher_starts(model.entry, model.t5, model.vae is None)
        parameters = {part: part_size(header, start) for part, start in starts.items()}
        for part, count in parameters.items():
            if not count:
                raise ModelFileError(
                    f"{path} holds no {part} of family '{model.family}' (no weight starts with {starts[part][0]!r}); "
                    "choose a file that does, or a pipeline directory"
                )
        stated_scheduler(header)
    except ModelFileError as error:
        raise ValueError(f"model.teacher: {error}") from None
    if model.teacher_config is not None:

        def configs(root: Path) -> dict[str, int]:
            _check_configs(model, root, header)
            return {}

        inspect("model.teacher_config", model.teacher_config, None, configs)
    return ModelFiles(str(path), path.parent, parameters)
