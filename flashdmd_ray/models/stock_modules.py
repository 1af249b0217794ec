"""Stock diffusers and transformers modules from a directory or the hub; every failure is one line with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
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
