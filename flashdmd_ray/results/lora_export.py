"""A LoRA student as one small file beside the teacher: for diffusers, or under kohya's names for ComfyUI and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.models.family import Family
from flashdmd_ray.results.export import (
    check_target,
    export_folder,
    loading_arguments,
    refuse_overflow,
    scheduled_loading,
    teacher_of,
)
from flashdmd_ray.results.model_card import CardFacts

LoraFormat = Literal["lora", "kohya"]
FILES: Mapping[LoraFormat, str] = {"lora": LORA_WEIGHT_NAME_SAFE, "kohya": "flashdmd_lora.safetensors"}
"""The file of weights in an export's directory."""


def export_lora(
    family: Family,
    lora: LoraConfig,
    weights: Mapping[str, Tensor],
    timesteps: Sequence[int],
    out: Path,
    facts: CardFacts,
    form: LoraFormat,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the adapter, the few-step scheduler, `flashdmd.json` and a model card to `out`, in one rename; returns `out`.

    weights: of the adapter (`AdaptedDenoiser.state_dict`). Both formats load with `pipeline.load_lora_weights`. Raises
    ValueError for kohya's format of a network that is no U-Net, for a value that does not fit dtype, and when `out` holds something else.
    """
    check_target(out, form, family.name)
    factor = (lora.alpha or lora.rank) / lora.rank
    tensors = {name: at_factor_one(name, tensor, factor) for name, tensor in weights.items()}
    if form == "kohya":
        tensors = convert_state_dict_to_kohya(tensors)
    refuse_overflow(tensors, dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}

    loading = _loading(family, timesteps, facts.base, form)
    with export_folder(family, timesteps, out, facts, loading, relation="adapter") as (folder, scheduler):
        save_file(tensors, folder / FILES[form], metadata={"format": "pt"})
        scheduler.save_pretrained(folder / "scheduler")
    return out


def at_factor_one(name: str, tensor: Tensor, factor: float) -> Tensor:
    """Multiply alpha / rank into B, so that a file needs no word about alpha: readers assume the rank."""
    return (tensor * factor if ".lora_B." in name else tensor).contiguous()


def _loading(family: Family, timesteps: Sequence[int], base: str, form: LoraFormat) -> str:
    teacher = loading_arguments(teacher_of(base), family.load_settings())
    return scheduled_loading(
        family,
        timesteps,
        f"""pipeline = {family.pipeline_class.__name__}.from_pretrained({teacher})
pipeline.load_lora_weights("path/to/this/directory", weight_name="{FILES[form]}")""",
    )
