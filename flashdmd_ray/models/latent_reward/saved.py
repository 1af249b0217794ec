"""Directories of latent reward models: config.json says which form, model.safetensors holds the weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models import latent_reward_class
from flashdmd_ray.models.config_files import check_json
from flashdmd_ray.models.headers import ModelFileError
from flashdmd_ray.models.latent_reward.base import LatentRewardModel
from flashdmd_ray.models.locations import fetch
from flashdmd_ray.models.stock_modules import load_part
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, weight_files
from flashdmd_ray.models.weight_reading import read_safetensors, weights_device
from flashdmd_ray.run.messages import one_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load_latent_reward(path: Path | str) -> LatentRewardModel:
    """The model in a directory written by `save_latent_reward`, as float32. Raises ValueError when it is not one."""
    try:
        root: Path = load_part(str(path), "", lambda: fetch(str(path), "", _check_whole, TRANSFORMERS))
        config = json.loads((root / CONFIG_FILE).read_text())
        with weights_device():
            model = _build(config)
        state = _read(root, TRANSFORMERS)
        base = config.get(f"base_{model.kind}")
        if base is not None:
            names = model.state_dict().keys() - state.keys()
            shared = _base_state(model, root / base)
            state |= {name: value for name, value in shared.items() if name in names}
        model.load_state_dict({name: value.float() for name, value in state.items()})
    except (FileNotFoundError, ModelFileError) as error:
        raise ValueError(f"{path} is not a complete latent reward model: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold a latent reward model: {one_line(error)}") from error
    return model


def save_latent_reward(
    model: LatentRewardModel, path: Path | str, *, dtype: torch.dtype = torch.float32, base: Path | None = None
) -> None:
    """Write `config.json` and `model.safetensors`, the weights in `dtype`.

    base: the directory of the diffusion network that the model was made from, which will lie at the same place relative to `path` when
    the model is loaded; weights that equal its own are left out.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().to(dtype).contiguous() for name, value in model.state_dict().items()}
    if base is not None:
        shared = _base_state(model, base)
        state = {
            name: value
            for name, value in state.items()
            if name not in shared or not torch.equal(value, shared[name].to(dtype))
        }
    relative = None if base is None else os.path.relpath(base, path)
    config = {**model.description(), f"base_{model.kind}": relative}
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_file(state, path / WEIGHTS_FILE)
    (path / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files for their owner only


def _check_whole(folder: Path) -> None:
    check_json(folder / CONFIG_FILE)
    weight_files(folder, TRANSFORMERS)


def _build(config: dict[str, Any]) -> LatentRewardModel:
    """Raises KeyError when the configuration is of no known form."""
    for name, entry in FAMILIES.items():
        if entry.denoiser in config:
            return latent_reward_class(name).from_description(config)
    raise KeyError(" or ".join(sorted({entry.denoiser for entry in FAMILIES.values()})))


def _read(folder: Path, stem: str) -> dict[str, Tensor]:
    """All weights in a folder, whole, as a variant or in shards."""
    headers = weight_files(folder, stem).headers
    return {name: value for header in headers for name, value in read_safetensors(header.path).items()}


def _base_state(model: LatentRewardModel, path: Path) -> dict[str, Tensor]:
    """Weights of a network's directory under the names they have inside the reward model."""
    state = model.as_blocks(_read(path, DIFFUSERS))
    return {f"{model.kind}.{name}": value for name, value in state.items()}
