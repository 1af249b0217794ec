"""Parts of one pretrained pipeline, from a diffusers directory or from one file in the original layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from diffusers.utils import logging as diffusers_logging
from torch import nn

from flashdmd_ray.models.stock_modules import load_config, load_module, load_part, load_tokenizer


class PipelineSource(ABC):
    """Where the parts of one pretrained pipeline come from. Every method raises ValueError as `load_part` does."""

    def __init__(self, path: str, configs: str, pipeline_class: Any) -> None:
        """path: the weights. configs: the pipeline directory or hub repository with their JSON files and tokenizers.

        index: the pipeline's model_index.json. Raises ValueError when it is of another family.
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
        return load_module(module_class, self.path, folder, dtype)


class SingleFile(PipelineSource):
    """One .safetensors file with all weights in the original layout, read by diffusers' own conversion.

    The file says nothing about tokenizers, scheduler and sizes: those come from a directory or hub repository.
    """

    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        # A component that is None is not loaded: the file is mapped, so each part is read alone.
        absent = {name: None for name, value in self.index.items() if isinstance(value, list) and name != folder}

        def load() -> nn.Module:
            diffusers_logging.disable_progress_bar()
            pipeline = self.pipeline_class.from_single_file(
                self.path,
                config=self.configs,
                torch_dtype=dtype,
                local_files_only=Path(self.configs).is_dir(),
                **absent,
            )
            module: nn.Module = getattr(pipeline, folder)
            unread = [name for name, parameter in module.named_parameters() if parameter.is_meta]
            if unread:
                raise ValueError(f"{len(unread)} weights are missing or of another shape, first {unread[0]!r}")
            if not isinstance(module, module_class):
                raise ValueError(f"{self.configs} describes a {type(module).__name__}, not a {module_class.__name__}")
            return module

        return load_part(self.path, folder, load).requires_grad_(False).eval()


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
