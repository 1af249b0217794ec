"""Weights of a few-step student that exists already, as the start of the generator: an export, a network's file, or a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.state_dicts import read_weights
from flashdmd_ray.models.stock_modules import load_module, load_part


def load_start(family: Family, path: str) -> dict[str, Tensor]:
    """Float32 weights, by the names of the family's stock network, of the student at `path`.

    path: a pipeline's directory or hub id, such as an export of this project or SDXL-Turbo; a file of the network's weights under
    diffusers' names, such as those of DMD2 and SDXL-Lightning; or a .safetensors file with a LoRA, such as LCM's, which is merged into the
    teacher.
    Raises ValueError, one line naming `generator.start`, for anything else and for weights of another network.
    """
    folder, network = FAMILIES[family.name].denoiser, family.denoiser().network
    try:
        if not Path(path).is_file():
            return dict(load_module(type(network), path, folder, torch.float32).state_dict())
        if is_lora(Path(path)):
            load_part(path, "the LoRA", lambda: merge_lora(family, network, path))
            return dict(network.state_dict())
        load_part(path, folder, lambda: network.load_state_dict(read_weights(Path(path))))
        return dict(network.state_dict())
    except ValueError as error:
        raise ValueError(f"generator.start: {error}") from error


def is_lora(file: Path) -> bool:
    """Return True for a safetensors file with matrices of low-rank adapters."""
    if file.suffix != ".safetensors":
        return False
    with safe_open(file, "pt") as tensors:
        return any("lora" in name for name in tensors.keys())  # noqa: SIM118 (the handle is no mapping)


def merge_lora(family: Family, network: ModelMixin, path: str) -> None:
    """Add the LoRA in a file, under the names of diffusers or kohya, to `network` in place.

    Raises ValueError for one that also changes text encoders: those are the teacher's here.
    """
    pipeline: Any = family.pipeline_class
    found = pipeline.lora_state_dict(path, unet_config=network.config)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    if any(name.startswith("text_encoder") for name in state):
        raise ValueError("it changes text encoders too, which stay the teacher's here")
    if FAMILIES[family.name].denoiser == "unet":
        pipeline.load_lora_into_unet(state, alphas, network)
    else:
        pipeline.load_lora_into_transformer(state, network)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
