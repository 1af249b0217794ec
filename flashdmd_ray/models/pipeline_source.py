"""Parts of one pretrained pipeline, from a diffusers directory or from one file in the original layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from diffusers.utils import logging as diffusers_logging
from torch import nn

from flashdmd_ray.models.config_files import check_module
from flashdmd_ray.models.headers import Header, ModelFileError, read_header
from flashdmd_ray.models.locations import fetch
from flashdmd_ray.models.single_file import (
    DENOISER_STARTS,
    VAE,
    VAE_STARTS,
    part_size,
    refuse_contradiction,
    scheduler_of,
    vae_file,
)
from flashdmd_ray.models.stock_modules import load_config, load_module, load_part, load_tokenizer
from flashdmd_ray.models.weight_files import DIFFUSERS, weight_files
from flashdmd_ray.models.weight_reading import type_in_file, weights_device


class PipelineSource(ABC):
    """Source of the parts of one pretrained pipeline. Every method raises ValueError as `load_part` does."""

    def __init__(self, path: str, configs: str, pipeline_class: Any) -> None:
        """Read the pipeline's model_index.json, `index`.

        path: the weights. configs: the pipeline directory or hub repository with their JSON files and tokenizers. Raises ValueError when
        it is of another family.
        """
        self.path = path
        self.configs = configs
        self.pipeline_class = pipeline_class
        self.index = load_config(pipeline_class, configs)
        name = self.index.get("_class_name")
        if name != pipeline_class.__name__:
            raise ValueError(
                f"{configs} holds a {name}, not a {pipeline_class.__name__}: choose the model family that matches it"
            )

    def config(self, folder: str) -> Mapping[str, Any]:
        """The JSON configuration of the part in that sub-folder of a pipeline."""
        config_class = DDPMScheduler if folder == "scheduler" else AutoencoderKL  # any of either reads any of them
        return load_config(config_class, self.configs, folder)

    def scheduler(self) -> Mapping[str, Any]:
        """The scheduler's configuration."""
        return self.config("scheduler")

    @abstractmethod
    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        """A frozen module in evaluation mode."""

    def tokenizer(self, tokenizer_class: Any, folder: str, encoder: Any) -> Any:
        """The tokenizer that belongs to a text encoder."""
        positions = getattr(encoder.config, "max_position_embeddings", None)
        return load_tokenizer(self.configs, folder, positions, encoder.config.vocab_size, tokenizer_class)


class PipelineDirectory(PipelineSource):
    """A diffusers pipeline directory, or a hub repository of that form."""

    def __init__(self, path: str, pipeline_class: Any) -> None:
        super().__init__(path, path, pipeline_class)

    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        module = load_module(module_class, self.path, folder, dtype)
        if issubclass(module_class, ModelMixin):
            root = fetch(self.path, folder, lambda inside: weight_files(inside, DIFFUSERS), DIFFUSERS)
            header = weight_files(root / folder, DIFFUSERS).headers[0]
            load_part(self.path, folder, lambda: refuse_contradiction(self.scheduler(), header))
        return module


class SingleFile(PipelineSource):
    """One .safetensors file with all weights in the original layout, read by diffusers' own conversion.

    The file holds no tokenizers, scheduler and sizes: those come from a directory or hub repository.
    """

    def scheduler(self) -> Mapping[str, Any]:
        """The configuration beside the file, with what the file states itself: its prediction type and zero terminal SNR."""
        config = super().scheduler()
        merged: Mapping[str, Any] = load_part(
            self.path, "the scheduler", lambda: scheduler_of(config, read_header(Path(self.path)))
        )
        return merged

    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        # A component that is None is not loaded: the file is mapped, so each part is read alone.
        absent = {name: None for name, value in self.index.items() if isinstance(value, list) and name != folder}

        def load() -> nn.Module:
            root = fetch(self.configs, folder, lambda inside: check_module(inside / "config.json"))
            diffusers_logging.disable_progress_bar()
            header = read_header(Path(self.path))
            starts = VAE_STARTS if folder == VAE else DENOISER_STARTS if issubclass(module_class, ModelMixin) else ()
            pipeline = self.pipeline_class.from_single_file(
                self.path, config=str(root), torch_dtype=_kept(dtype, header, starts), local_files_only=True, **absent
            )
            module: nn.Module = getattr(pipeline, folder)
            if not isinstance(module, module_class):
                raise ModelFileError(
                    f"{self.configs} describes a {type(module).__name__}, not a {module_class.__name__}; choose another"
                )
            check_single_file(module, header, starts)
            return module

        return load_part(self.path, folder, load).requires_grad_(False).eval()


def load_vae_file(path: str, configs: str, dtype: torch.dtype) -> nn.Module:
    """The VAE in one .safetensors file, in the original or diffusers' layout, of the form of the VAE in `configs`."""

    def load() -> nn.Module:
        header, _ = vae_file(Path(path))
        root = fetch(configs, "vae", lambda inside: check_module(inside / "config.json"))
        module: nn.Module = AutoencoderKL.from_single_file(
            path, config=str(root), subfolder="vae", torch_dtype=_kept(dtype, header), local_files_only=True
        )
        check_single_file(module, header, ("",))
        return module

    vae: nn.Module = load_part(path, "the VAE", load).requires_grad_(False).eval()
    return vae


def _kept(dtype: torch.dtype, header: Header, starts: Sequence[str] = ()) -> torch.dtype:
    """The type to load in. Where no values are wanted it is the file's own: then its bytes are mapped, and none is read."""
    if weights_device().type == "cpu":
        return dtype
    others = (*DENOISER_STARTS, *VAE_STARTS)
    names = [name for name in header.shapes if name.startswith(tuple(starts) if starts else others) == bool(starts)]
    return type_in_file(header, names or list(header.shapes))


def check_single_file(module: nn.Module, header: Header, starts: Sequence[str]) -> None:
    """Raises ModelFileError when the file lacks weights of the module, or has others that would not be read.

    starts: how the names of the module's weights start; empty when they cannot be told apart, as in text encoders, some of whose
    weights are made of others. diffusers' conversion splits and renames weights, so it is their number of values that is compared.
    """
    unread = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if unread:
        raise ModelFileError(
            f"{len(unread)} weights are missing or of another shape, first {unread[0]!r}; download the file again, or choose another"
        )
    read = sum(tensor.numel() for tensor in module.state_dict().values())
    there = part_size(header, starts)
    if starts and there != read:
        raise ModelFileError(
            f"it holds {there:,} values of this part and {read:,} are read: its weights need others beside them, or are of another model; "
            "choose another file"
        )


def open_source(pipeline_class: Any, path: str, configs: str | None = None) -> PipelineSource:
    """The pretrained pipeline at `path`: a directory, a hub id or a .safetensors file in the original layout.

    configs: for a file, the directory or hub id of its JSON files and tokenizers; None is the hub repository that
    diffusers infers. Raises ValueError when there is nothing, or a pipeline of another family.
    """
    if not path.endswith(".safetensors"):
        return PipelineDirectory(path, pipeline_class)
    if not Path(path).is_file():
        raise ValueError(f"model.teacher: no such file: {path}; correct the path or download it")
    if configs is not None:
        return SingleFile(path, configs, pipeline_class)
    repository = load_part(path, "", lambda: fetch_diffusers_config(load_single_file_checkpoint(path)))
    inferred = repository["pretrained_model_name_or_path"]
    try:
        return SingleFile(path, inferred, pipeline_class)
    except ValueError as error:
        raise ValueError(
            f"model.teacher_config: null takes the configuration of {inferred} for {path}, which does not work ({error}); "
            "set it to a directory or hub id of that model's pipeline"
        ) from None
