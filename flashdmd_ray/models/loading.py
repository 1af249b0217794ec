"""Read stock diffusers and transformers modules from a directory or the hub, or say in one line why that fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from torch import nn
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

# A damaged or foreign file can raise any of these from safetensors, json, diffusers and transformers; none of them
# names the remedy.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)


def load_part(path: str, part: str, load: Callable[[], Any]) -> Any:
    """The result of `load()`. Raises ValueError naming `path`, `part` and the remedy when it fails."""
    try:
        return load()
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load {part or 'the model'} from {path}: {reason[:300]}; {_remedy(path)}") from error
    except Exception as error:  # safetensors raises its own class, derived from Exception alone
        if type(error).__module__.split(".")[0] not in ("safetensors", "safetensors_rust", "huggingface_hub"):
            raise
        raise ValueError(f"cannot load {part or 'the model'} from {path}: {error}; {_remedy(path)}") from error


def _remedy(path: str) -> str:
    if Path(path).exists():
        return "the directory is incomplete or damaged: write or download it again"
    return "no such directory, and not a hub repository that can be reached from here: correct the path or download it"


def load_module(module_class: Any, path: str, subfolder: str, dtype: torch.dtype) -> Any:
    """A frozen module in evaluation mode, its weights from safetensors only.

    Raises ValueError when files are missing or damaged, and when the weights do not cover the module: a part left at
    random initial values must never pass as a pretrained one.
    """
    where = subfolder or "the model"

    def load() -> nn.Module:
        arguments: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
        if subfolder:
            arguments["subfolder"] = subfolder
        if issubclass(module_class, ModelMixin):
            arguments["low_cpu_mem_usage"] = False  # the default asks for one more dependency
        disable_progress_bar()
        module, info = module_class.from_pretrained(path, **arguments)
        absent = sorted(info.get("missing_keys", ())) + sorted(str(key) for key in info.get("mismatched_keys", ()))
        if absent:
            raise ValueError(f"{len(absent)} weights are missing or of another shape, first {absent[0]!r}")
        return module

    return load_part(path, where, load).requires_grad_(False).eval()


def load_tokenizer(path: str, subfolder: str, positions: int, vocabulary: int) -> CLIPTokenizer:
    """The CLIP tokenizer of an encoder with that many positions and token embeddings. Raises ValueError as
    `load_part` does.

    transformers answers with an empty tokenizer when the files are missing: that is refused here.
    """

    def load() -> CLIPTokenizer:
        arguments = {"subfolder": subfolder} if subfolder else {}
        tokenizer = CLIPTokenizer.from_pretrained(path, **arguments)
        if tokenizer.model_max_length > positions or not 2 < len(tokenizer) <= vocabulary:
            raise ValueError("the tokenizer's files are missing or belong to another text encoder")
        return tokenizer

    return load_part(path, subfolder or "the tokenizer", load)


def load_config(config_class: Any, path: str, subfolder: str = "") -> Mapping[str, Any]:
    """The JSON configuration of one part of a diffusers directory. Raises ValueError as `load_part` does."""
    arguments = {"subfolder": subfolder} if subfolder else {}
    return load_part(path, subfolder or "model_index.json", lambda: config_class.load_config(path, **arguments))


class Source(ABC):
    """Where the parts of one pretrained pipeline come from. Every method raises ValueError as `load_part` does."""

    def __init__(self, path: str, index: Mapping[str, Any]) -> None:
        """index: the pipeline's model_index.json."""
        self.path = path
        self.index = index

    @abstractmethod
    def config(self, folder: str) -> Mapping[str, Any]:
        """The JSON configuration of the part in that sub-folder of a pipeline."""

    @abstractmethod
    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        """A frozen module in evaluation mode."""

    @abstractmethod
    def clip_tokenizer(self, folder: str, encoder: Any) -> CLIPTokenizer:
        """The tokenizer that belongs to a CLIP text encoder."""


class PipelineDirectory(Source):
    """A diffusers pipeline directory, or a hub repository of that form."""

    def config(self, folder: str) -> Mapping[str, Any]:
        config_class = DDPMScheduler if folder == "scheduler" else AutoencoderKL  # any ConfigMixin reads any config
        return load_config(config_class, self.path, folder)

    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        return load_module(module_class, self.path, folder, dtype)

    def clip_tokenizer(self, folder: str, encoder: Any) -> CLIPTokenizer:
        return load_tokenizer(self.path, folder, encoder.config.max_position_embeddings, encoder.config.vocab_size)


def open_source(pipeline_class: Any, path: str) -> Source:
    """The pretrained pipeline at `path`. Raises ValueError when there is none or it is of another family."""
    index = load_config(pipeline_class, path)
    found, wanted = index.get("_class_name"), pipeline_class.__name__
    if found != wanted:
        raise ValueError(f"{path} holds a {found}, not a {wanted}: choose the model family that matches it")
    return PipelineDirectory(path, index)
