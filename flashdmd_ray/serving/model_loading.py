"""Loading of exports: whole students, LoRA students on a shared base, and the teachers they were distilled from."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashdmd_ray.catalog.families import FAMILIES, latent_size
from flashdmd_ray.config import LoraConfig, ModelConfig
from flashdmd_ray.demo import weights_path
from flashdmd_ray.models import family_class
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import Denoiser
from flashdmd_ray.models.family import PARTS, Family
from flashdmd_ray.models.stock_modules import load_part
from flashdmd_ray.results.export_facts import FACTS, SINGLE_FILE, read_facts
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.serving.batch_invariance import make_batch_invariant
from flashdmd_ray.serving.messages import ModelInfo, Size
from flashdmd_ray.serving.settings import TEACHER, ServeSettings
from flashdmd_ray.serving.step_sampler import StepSampler, StudentSampler, TeacherSampler

DEMO_BASE = "digit-scenes teacher of flashdmd_ray"
"""Name of its base in an export of the demo."""
LORA_FILE = "pytorch_lora_weights.safetensors"
OTHER_PROGRAMS = {"flashdmd_lora.safetensors": "--format lora", SINGLE_FILE: "--format pipeline"}
"""Files of exports that are not served, and the format that is."""


@dataclass(frozen=True)
class ModelVersion:
    """One loaded version of a name. samplers, infos: by the name that clients use, such as demo and demo:teacher."""

    name: str
    version: str
    samplers: Mapping[str, StepSampler]
    infos: Mapping[str, ModelInfo]


class ModelLoader:
    """Reader of exports. Bases are read once and shared: by LoRA students and as teachers, over versions too."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._device = torch.device("cuda" if settings.replica.has_gpu else "cpu")
        self._bases: dict[tuple[str, str], Family] = {}
        self._lock = threading.Lock()

    def load(self, name: str, folder: Path) -> ModelVersion:
        """Load the export in `folder`, whose name is its version. Raises ValueError, one line, when it cannot be served."""
        facts = read_facts(folder)
        with self._lock:
            base = self._find_base(facts)
            family, network = self._read_student(folder, facts, base)
            samplers: dict[str, StepSampler] = {name: StudentSampler(family, network, facts["timesteps"])}
            if base is not None and self._settings.teachers:
                teacher = self._base(facts, base, ["denoiser"]).teacher
                samplers[name + TEACHER] = TeacherSampler(family, teacher, self._settings.teacher_guidance)
        for sampler in samplers.values():
            for module in (sampler.network.network, sampler.family.vae):
                module.to(memory_format=torch.channels_last)  # takes 7 % less time on a CPU
                if self._device.type == "cpu":
                    make_batch_invariant(module)
        infos = {model: self._info(model, folder.name, facts, sampler) for model, sampler in samplers.items()}
        return ModelVersion(name, folder.name, samplers, infos)

    def _read_student(self, folder: Path, facts: Mapping[str, Any], base: str | None) -> tuple[Family, Denoiser]:
        if not (folder / LORA_FILE).is_file():
            for name, remedy in OTHER_PROGRAMS.items():
                if (folder / name).is_file():
                    raise ValueError(f"{folder} holds {name}, which is for other programs; export with {remedy}")
            family = self._read_family(facts, str(folder), PARTS)
            return family, family.teacher
        if base is None:
            raise ValueError(
                f"{folder} is a LoRA on {facts['base']!r}, which is not here; say where it is with bases: {{{facts['base']!r}: ...}}"
            )
        family = self._base(facts, base, PARTS)
        return family, read_adapter(folder / LORA_FILE, family)

    def _base(self, facts: Mapping[str, Any], base: str, parts: Sequence[str]) -> Family:
        key = (base, json.dumps(_shape_settings(facts)))
        if key not in self._bases:
            self._bases[key] = self._read_family(facts, base, ())
        return self._bases[key].load(parts)

    def _read_family(self, facts: Mapping[str, Any], path: str, parts: Sequence[str]) -> Family:
        name = family_name(facts)
        model = {"family": name, "teacher": path, "dtype": self._settings.dtype, **_shape_settings(facts)}
        return family_class(name).from_config(ModelConfig.model_validate(model), ()).to(self._device).load(parts)

    def _find_base(self, facts: Mapping[str, Any]) -> str | None:
        """Return directory or hub id of the pipeline that a student was distilled from; None when it is not known here."""
        base = str(facts["base"])
        if base in self._settings.bases:
            return self._settings.bases[base]
        if base == DEMO_BASE:
            part = FAMILIES[family_name(facts)].demo
            return None if part is None else str(weights_path(part))
        return base if Path(base).is_dir() else None

    def _info(self, model: str, version: str, facts: Mapping[str, Any], sampler: StepSampler) -> ModelInfo:
        settings = self._settings
        return ModelInfo(
            name=model,
            version=version,
            created=int(time.time()),
            kind="student" if isinstance(sampler, StudentSampler) else "teacher",
            base=str(facts["base"]),
            steps=sampler.step_counts if isinstance(sampler, StudentSampler) else (settings.teacher_steps,),
            sizes=offered_sizes(sampler.family, settings.limits.pixels),
            cost_per_step=sampler.forwards_per_step / len(facts["timesteps"]),
            guidance_scale=sampler.guidance_scale if isinstance(sampler, TeacherSampler) else None,
            aliases=tuple(alias for alias, target in settings.aliases.items() if target == model),
            examples=tuple(str(example["prompt"]) for example in facts.get("examples", ())),
        )


def family_name(facts: Mapping[str, Any]) -> str:
    """Return the family whose pipeline class an export names. Raises ValueError for a pipeline of no family."""
    for name, entry in FAMILIES.items():
        if entry.pipeline == facts.get("pipeline"):
            return name
    raise ValueError(f"{FACTS}: no model family has a {str(facts.get('pipeline'))[:100]!r}; export the model again")


def _shape_settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Derive the settings of `ModelConfig` that the pipeline call's arguments imply."""
    call = facts["call"]
    settings: dict[str, Any] = {"resolution": [call["height"], call["width"]]} if "height" in call else {}
    for name, key in (("original_size", "original_size"), ("crops_coords_top_left", "crop")):
        if name in call:
            settings[key] = call[name]
    t5 = bool(FAMILIES[family_name(facts)].optional_encoders)
    return settings | {"t5": t5 and "text_encoder_3" not in facts.get("load", {"text_encoder_3": None})}


def read_adapter(file: Path, family: Family) -> AdaptedDenoiser:
    """Put a diffusers LoRA file on the family's own network. Raises ValueError when it does not fit."""
    tensors: dict[str, Tensor] = load_part(str(file), "the LoRA", lambda: load_file(file))
    layers = sorted({name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name})
    ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    if not layers or len(ranks) != 1:
        raise ValueError(f"{file} is no LoRA of one rank with diffusers' names; export it with --format lora")
    settings = LoraConfig(networks=("generator",), rank=ranks.pop(), targets=tuple(layers))
    try:
        adapted = AdaptedDenoiser(family.teacher, settings, seed=0)
        adapted.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file} does not fit {family.path} ({one_line(error)}); serve it on its own base") from None
    return adapted.requires_grad_(False).eval()


def offered_sizes(family: Family, max_pixels: int) -> tuple[Size, ...]:
    """List the trained size, then a wide and a tall one of about as many pixels, where the network can generate them.

    Raises ValueError when even one image of the trained size is more than `max_pixels`.
    """
    height, width = family.image_size
    if height * width > max_pixels:
        raise ValueError(f"limits.pixels: one image of {width}x{height} is more than {max_pixels}; raise the limit")
    network, vae = family.teacher.network.config, family.vae.config
    unit = _size_unit(network, vae)
    sizes = [family.image_size]
    for ratio in (4 / 3, 3 / 4):
        size = (unit * round(height / ratio**0.5 / unit), unit * round(width * ratio**0.5 / unit))
        if all(size) and size not in sizes and size[0] * size[1] <= max_pixels and _fits(size, network, vae):
            sizes.append(size)
    return tuple(sizes)


def _size_unit(network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Pixels that sides are multiples of: whole latents at the network's lowest resolution, whole patches."""
    levels = len(network.get("block_out_channels") or [0])
    pixels = 2 ** (len(vae["block_out_channels"]) - 1) * int(network.get("patch_size") or 2 ** (levels - 1))
    return pixels if pixels < 16 else max(pixels, 64)


def _fits(size: Size, network: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    try:
        latent_size(size, network, vae)
    except ValueError:
        return False
    return True
