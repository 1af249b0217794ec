"""From an export's directory to networks that draw: whole students, LoRA students on a shared base, teachers."""

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
from flashdmd_ray.models.loading import load_part
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.numerics import steady
from flashdmd_ray.serving.settings import TEACHER, ServeSettings
from flashdmd_ray.serving.sources import FACTS
from flashdmd_ray.serving.student import Artist, Size, Student, Teacher

DEMO_BASE = "digit-scenes teacher of flashdmd_ray"
"""What an export of the demo calls its base."""
LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "flashdmd_lora.safetensors"


@dataclass(frozen=True)
class Version:
    """One loaded version of a name: artists by the name that clients use, and what clients are told of each."""

    name: str
    version: str
    artists: Mapping[str, Artist]
    infos: Mapping[str, ModelInfo]


class Loader:
    """Reads exports. Bases are read once and shared: by LoRA students and as teachers, over versions too."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._device = torch.device("cuda" if settings.replica.gpus else "cpu")
        self._bases: dict[tuple[str, str], Family] = {}
        self._lock = threading.Lock()

    def load(self, name: str, folder: Path) -> Version:
        """The export in `folder`, whose name is its version. Raises ValueError, one line, when it cannot be served."""
        facts = read_facts(folder)
        with self._lock:
            base = self._find_base(facts)
            family, network = self._read_student(folder, facts, base)
            artists: dict[str, Artist] = {name: Student(family, network, facts["timesteps"])}
            if base is not None and self._settings.teachers:
                teacher = self._base(facts, base, ["denoiser"]).teacher
                artists[name + TEACHER] = Teacher(family, teacher, self._settings.teacher_guidance)
        for artist in artists.values():
            for module in (artist.network.network, artist.family.vae):
                module.to(memory_format=torch.channels_last)  # drawing takes 7 % less time on a CPU
                if self._device.type == "cpu":
                    steady(module)
        infos = {called: self._info(called, folder.name, facts, artist) for called, artist in artists.items()}
        return Version(name, folder.name, artists, infos)

    def _read_student(self, folder: Path, facts: Mapping[str, Any], base: str | None) -> tuple[Family, Denoiser]:
        if not (folder / LORA_FILE).is_file():
            if (folder / KOHYA_FILE).is_file():
                raise ValueError(
                    f"{folder} is in kohya's format, which is for other programs; export with --format lora"
                )
            family = self._read_family(facts, str(folder), PARTS)
            return family, family.teacher
        if base is None:
            raise ValueError(
                f"{folder} is a LoRA on {facts['base']!r}, which is not here; say where it is with bases: {{{facts['base']!r}: ...}}"
            )
        family = self._base(facts, base, PARTS)
        return family, read_adapter(folder / LORA_FILE, family)

    def _base(self, facts: Mapping[str, Any], base: str, parts: Sequence[str]) -> Family:
        key = (base, json.dumps(_shape(facts)))
        if key not in self._bases:
            self._bases[key] = self._read_family(facts, base, ())
        return self._bases[key].load(parts)

    def _read_family(self, facts: Mapping[str, Any], path: str, parts: Sequence[str]) -> Family:
        name = family_name(facts)
        model = {"family": name, "teacher": path, "dtype": self._settings.dtype, **_shape(facts)}
        return family_class(name).from_config(ModelConfig.model_validate(model), ()).to(self._device).load(parts)

    def _find_base(self, facts: Mapping[str, Any]) -> str | None:
        """Directory or hub id of the pipeline that a student was distilled from; None when it is not known here."""
        base = str(facts["base"])
        if base in self._settings.bases:
            return self._settings.bases[base]
        if base == DEMO_BASE:
            part = FAMILIES[family_name(facts)].demo
            return None if part is None else str(weights_path(part))
        return base if Path(base).is_dir() else None

    def _info(self, called: str, version: str, facts: Mapping[str, Any], artist: Artist) -> ModelInfo:
        settings = self._settings
        return ModelInfo(
            name=called,
            version=version,
            created=int(time.time()),
            kind="student" if isinstance(artist, Student) else "teacher",
            base=str(facts["base"]),
            steps=artist.step_counts if isinstance(artist, Student) else (settings.teacher_steps,),
            sizes=offered_sizes(artist.family, settings.limits.pixels),
            guidance_scale=artist.guidance_scale if isinstance(artist, Teacher) else None,
            aliases=tuple(alias for alias, target in settings.aliases.items() if target == called),
        )


def read_facts(folder: Path) -> dict[str, Any]:
    """What flashdmd.json says. Raises ValueError when it is damaged or of another kind."""
    try:
        facts = dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
        timesteps = facts["timesteps"]
        falling = all(isinstance(t, int) and 0 <= t < 1000 for t in timesteps) and timesteps == sorted(timesteps)[::-1]
        if not timesteps or not falling or not isinstance(facts["base"], str) or not isinstance(facts["call"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / FACTS} is damaged or of another version; export the model again") from None
    return facts


def family_name(facts: Mapping[str, Any]) -> str:
    """Of the family whose pipelines the export is of. Raises ValueError for a pipeline that is of none."""
    for name, entry in FAMILIES.items():
        if entry.pipeline == facts.get("pipeline"):
            return name
    raise ValueError(f"{FACTS}: no model family has a {str(facts.get('pipeline'))[:100]!r}; export the model again")


def _shape(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the model that the call's arguments imply."""
    call = facts["call"]
    shape: dict[str, Any] = {"resolution": [call["height"], call["width"]]} if "height" in call else {}
    for name, key in (("original_size", "original_size"), ("crops_coords_top_left", "crop")):
        if name in call:
            shape[key] = call[name]
    return shape | ({} if facts.get("load", {"text_encoder_3": None}) else {"t5": family_name(facts) == "sd3"})


def read_adapter(file: Path, family: Family) -> AdaptedDenoiser:
    """The student in a diffusers LoRA file on the family's own network. Raises ValueError when it does not fit."""
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


def offered_sizes(family: Family, most_pixels: int) -> tuple[Size, ...]:
    """The trained size, then a wide and a tall one of about as many pixels, where the network can draw them.

    Raises ValueError when even one image of the trained size is more than the limit.
    """
    height, width = family.image_size
    if height * width > most_pixels:
        raise ValueError(f"limits.pixels: one image of {width}x{height} is more than {most_pixels}; raise the limit")
    network, vae = family.teacher.network.config, family.vae.config
    unit = _size_unit(network, vae)
    sizes = [family.image_size]
    for ratio in (4 / 3, 3 / 4):
        size = (unit * round(height / ratio**0.5 / unit), unit * round(width * ratio**0.5 / unit))
        if all(size) and size not in sizes and size[0] * size[1] <= most_pixels and _fits(size, network, vae):
            sizes.append(size)
    return tuple(sizes)


def _size_unit(network: Mapping[str, Any], vae: Mapping[str, Any]) -> int:
    """Sides are multiples of so many pixels: whole latents at the network's lowest resolution, whole patches."""
    levels = len(network.get("block_out_channels") or [0])
    pixels = 2 ** (len(vae["block_out_channels"]) - 1) * int(network.get("patch_size") or 2 ** (levels - 1))
    return pixels if pixels < 16 else max(pixels, 64)


def _fits(size: Size, network: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    try:
        latent_size(size, network, vae)
    except ValueError:
        return False
    return True
