"""Stock diffusers and transformers modules from a directory or the hub; every failure is one line with its remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from flashdmd_ray.models.config_files import check_json, check_module, check_tokenizer
from flashdmd_ray.models.headers import ModelFileError
from flashdmd_ray.models.locations import fetch
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, WeightFiles, weight_files
from flashdmd_ray.models.weight_reading import empty_tensors, weights_device
from flashdmd_ray.run.messages import one_line

# A damaged or foreign file can raise any of these from safetensors, json, diffusers and transformers; none of them
# names the remedy.
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError)
_LOADING_PACKAGES = ("safetensors", "safetensors_rust", "huggingface_hub", "diffusers", "httpx", "httpx2")
KNOWN_UNUSED = r"(^|\.)position_ids$"
"""Names of constants that older versions of the libraries saved with the weights."""


def load_part(path: str, part: str, load: Callable[[], Any]) -> Any:
    """The result of `load()`. Raises ValueError naming `path`, `part` and the remedy when it fails."""
    try:
        return load()
    except ModelFileError as error:  # has its own remedy
        raise ValueError(f"cannot load {part or 'the model'} from {path}: {error}") from error
    except Exception as error:
        # safetensors and diffusers also raise classes of their own, derived from Exception alone.
        if not isinstance(error, _LOADING_ERRORS) and type(error).__module__.split(".")[0] not in _LOADING_PACKAGES:
            raise
        what = f"it has no {error.args[0]!r}" if isinstance(error, KeyError) and error.args else one_line(error)
        raise ValueError(f"cannot load {part or 'the model'} from {path}: {what}; {_remedy(path)}") from error


def _remedy(path: str) -> str:
    if Path(path).is_file():
        return "the file is damaged or holds another kind of model: download it again, or choose another"
    if Path(path).exists():
        return "the directory is incomplete or damaged: write or download it again"
    return "no such directory, and not a hub repository that can be reached from here: correct the path or download it"


def load_module(module_class: Any, path: str, subfolder: str, dtype: torch.dtype, unused: str = KNOWN_UNUSED) -> Any:
    """A frozen module in evaluation mode, with the weights that `weight_files` finds in the sub-folder.

    unused: pattern of the weights in the file that the module does not have. Raises ValueError when files are missing or damaged, and
    when the weights are not exactly those of the module: a part left at random values must never pass as a pretrained one, nor
    weights that need others beside them.
    """
    from_diffusers = issubclass(module_class, ModelMixin)
    stem = DIFFUSERS if from_diffusers else TRANSFORMERS

    def load() -> nn.Module:
        root = fetch(path, subfolder, lambda folder: weight_files(folder, stem), stem)
        check_module(root / subfolder / "config.json", class_name=module_class.__name__ if from_diffusers else None)
        files = weight_files(root / subfolder, stem)
        disable_progress_bar()
        if weights_device().type == "meta":
            return _without_values(module_class, root / subfolder, files, unused)
        arguments: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True, "dtype": dtype}
        arguments |= {"local_files_only": True, "variant": files.variant, "ignore_mismatched_sizes": True}
        if subfolder:
            arguments["subfolder"] = subfolder
        if from_diffusers:
            arguments["low_cpu_mem_usage"] = False  # the default asks for one more dependency
        module, info = module_class.from_pretrained(str(root), **arguments)
        _check_loaded(info, unused)
        return module

    return load_part(path, subfolder or "the model", load).requires_grad_(False).eval()


def _without_values(module_class: Any, folder: Path, files: WeightFiles, unused: str) -> nn.Module:
    """The module on the meta device. Its weights are compared with those of the files as the libraries do it."""
    state = {name: tensor for header in files.headers for name, tensor in empty_tensors(header).items()}
    if not issubclass(module_class, ModelMixin):
        config = module_class.config_class.from_pretrained(str(folder), local_files_only=True)
        arguments = {"ignore_mismatched_sizes": True, "output_loading_info": True, "device_map": "meta"}
        module, info = module_class.from_pretrained(None, config=config, state_dict=state, **arguments)
    else:
        with torch.device("meta"):
            module = module_class.from_config(module_class.load_config(str(folder), local_files_only=True))
        module._fix_state_dict_keys_on_load(state)  # names of older versions
        own = module.state_dict()
        info = {
            "missing_keys": own.keys() - state.keys(),
            "unexpected_keys": state.keys() - own.keys(),
            "mismatched_keys": [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape],
        }
    _check_loaded(info, unused)
    loaded: nn.Module = module
    return loaded


def _check_loaded(info: Mapping[str, Any], unused: str) -> None:
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
    absent = sorted(map(str, [*info.get("missing_keys", ()), *mismatched]))
    if absent:
        raise ValueError(
            f"{len(absent)} weights are missing or of another shape than config.json says, first {absent[0]!r}"
        )
    extra = sorted(name for name in map(str, info.get("unexpected_keys", ())) if not re.search(unused, name))
    if extra:
        raise ValueError(f"{len(extra)} weights in it are of another model, first {extra[0]!r}")
    errors = [*info.get("error_msgs", ()), *info.get("conversion_errors", {}).values()]
    if errors:
        raise ValueError(str(errors[0]))


def load_tokenizer(
    path: str, subfolder: str, positions: int | None, vocabulary: int, tokenizer_class: Any = CLIPTokenizer
) -> Any:
    """The tokenizer of an encoder with that many positions (None: any number) and token embeddings.

    Raises ValueError when its files are missing, for which transformers would answer an empty tokenizer, or another encoder's.
    """

    def load() -> Any:
        root = fetch(path, subfolder, check_tokenizer)
        check_tokenizer(root / subfolder)
        arguments = {"subfolder": subfolder} if subfolder else {}
        tokenizer = tokenizer_class.from_pretrained(str(root), local_files_only=True, **arguments)
        too_long = positions is not None and tokenizer.model_max_length > positions
        if too_long or not 2 < len(tokenizer) <= vocabulary:
            raise ValueError("the tokenizer's files are missing or belong to another text encoder")
        return tokenizer

    return load_part(path, subfolder or "the tokenizer", load)


def load_config(config_class: Any, path: str, subfolder: str = "", part: str = "model_index.json") -> Mapping[str, Any]:
    """The JSON configuration in that sub-folder, or, without one, of `part`. Raises ValueError as `load_part` does."""
    name = config_class.config_name

    def load() -> Mapping[str, Any]:
        root = fetch(path, subfolder, lambda folder: check_json(folder / name))
        config: Mapping[str, Any] = config_class.load_config(str(root / subfolder), local_files_only=True)
        return config

    return load_part(path, subfolder or part, load)
