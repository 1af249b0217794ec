"""Read stock diffusers and transformers modules from a directory or the hub, or say in one line why that fails."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from flashdmd_ray.run.messages import one_line

# A damaged or foreign file can raise any of these from safetensors, json, diffusers and transformers; none of them
# names the remedy.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
_LOADING_PACKAGES = ("safetensors", "safetensors_rust", "huggingface_hub", "diffusers")


def load_part(path: str, part: str, load: Callable[[], Any]) -> Any:
    """The result of `load()`. Raises ValueError naming `path`, `part` and the remedy when it fails."""
    try:
        return load()
    except Exception as error:
        # safetensors and diffusers also raise classes of their own, derived from Exception alone.
        if not isinstance(error, _LOADING_ERRORS) and type(error).__module__.split(".")[0] not in _LOADING_PACKAGES:
            raise
        raise ValueError(
            f"cannot load {part or 'the model'} from {path}: {one_line(error)}; {_remedy(path)}"
        ) from error


def _remedy(path: str) -> str:
    if Path(path).is_file():
        return "the file is damaged or holds another kind of model: download it again, or choose another"
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


def load_tokenizer(
    path: str, subfolder: str, positions: int | None, vocabulary: int, tokenizer_class: Any = CLIPTokenizer
) -> Any:
    """The tokenizer of an encoder with that many positions (None: any number) and token embeddings. Raises ValueError
    as `load_part` does.

    transformers answers with an empty tokenizer when the files are missing: that is refused here.
    """

    def load() -> Any:
        arguments = {"subfolder": subfolder} if subfolder else {}
        tokenizer = tokenizer_class.from_pretrained(path, **arguments)
        too_long = positions is not None and tokenizer.model_max_length > positions
        if too_long or not 2 < len(tokenizer) <= vocabulary:
            raise ValueError("the tokenizer's files are missing or belong to another text encoder")
        return tokenizer

    return load_part(path, subfolder or "the tokenizer", load)


def load_config(config_class: Any, path: str, subfolder: str = "", part: str = "model_index.json") -> Mapping[str, Any]:
    """The JSON configuration in that sub-folder, or, without one, of `part`. Raises ValueError as `load_part` does."""
    arguments = {"subfolder": subfolder} if subfolder else {}
    return load_part(path, subfolder or part, lambda: config_class.load_config(path, **arguments))


class Source(ABC):
    """Where the parts of one pretrained pipeline come from. Every method raises ValueError as `load_part` does."""

    def __init__(self, path: str, configs: str, pipeline_class: Any) -> None:
        """path: the weights. configs: the pipeline directory or hub repository with their JSON files and tokenizers.

        index: the pipeline's model_index.json. Raises ValueError when it is of another family.
        """
        self.path = path
        self.configs = configs
        self.pipeline_class = pipeline_class
        self.index = load_config(pipeline_class, configs)
        found, wanted = self.index.get("_class_name"), pipeline_class.__name__
        if found != wanted:
            raise ValueError(f"{configs} holds a {found}, not a {wanted}: choose the model family that matches it")

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


class PipelineDirectory(Source):
    """A diffusers pipeline directory, or a hub repository of that form."""

    def __init__(self, path: str, pipeline_class: Any) -> None:
        super().__init__(path, path, pipeline_class)

    def module(self, module_class: Any, folder: str, dtype: torch.dtype) -> Any:
        return load_module(module_class, self.path, folder, dtype)


class SingleFile(Source):
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


def open_source(pipeline_class: Any, path: str, configs: str | None = None) -> Source:
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
