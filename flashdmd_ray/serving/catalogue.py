"""From a model's source to networks that draw."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashdmd_ray.config import ModelConfig
from flashdmd_ray.demo import weights_path
from flashdmd_ray.models import FAMILIES, family_class, latent_size
from flashdmd_ray.models.family import Family
from flashdmd_ray.serving.messages import ModelInfo
from flashdmd_ray.serving.settings import TEACHER, ServeSettings
from flashdmd_ray.serving.student import Artist, Size, Student, Teacher

FACTS = "flashdmd.json"
DEMO_BASE = "digit-scenes teacher of flashdmd_ray"
"""What an export of the demo calls its base."""


@dataclass(frozen=True)
class Version:
    """One loaded version of a name: artists by the name that clients use."""

    name: str
    version: str
    artists: Mapping[str, Artist]
    infos: tuple[ModelInfo, ...]


def load_version(name: str, source: str, settings: ServeSettings) -> Version:
    """Read an export. Raises ValueError, one line, when it cannot be served."""
    folder = find_export(source)
    facts = read_facts(folder)
    family = _family(folder, facts, settings)
    student = Student(family, family.teacher, facts["timesteps"])
    version = fingerprint(folder)
    artists: dict[str, Artist] = {name: student}
    infos = [_info(name, version, facts, student, settings)]
    if settings.teachers and (base := find_base(facts, settings)) is not None:
        teacher = family_class(family.name).from_pretrained(base, parts=["denoiser"]).teacher
        artists[name + TEACHER] = Teacher(family, teacher, settings.teacher_guidance)
        infos.append(_info(name + TEACHER, version, facts, artists[name + TEACHER], settings))
    return Version(name, version, artists, tuple(infos))


def find_export(source: str) -> Path:
    """The export's directory, or that of a run folder."""
    for folder in (Path(source), Path(source) / "export"):
        if (folder / FACTS).is_file():
            return folder
    raise ValueError(f"{source}: neither an export nor a run folder with one (there is no {FACTS})")


def read_facts(folder: Path) -> dict[str, Any]:
    """What flashdmd.json says. Raises ValueError when it is damaged or of another kind."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        timesteps = facts["timesteps"]
        if not timesteps or not all(isinstance(t, int) for t in timesteps):
            raise ValueError
        str(facts["base"]), str(facts["pipeline"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / FACTS} is damaged or of another version; export the model again") from None
    return dict(facts)


def _family(folder: Path, facts: Mapping[str, Any], settings: ServeSettings) -> Family:
    names = [name for name, entry in FAMILIES.items() if entry.pipeline == facts["pipeline"]]
    if not names:
        raise ValueError(f"{folder / FACTS}: no model family has a {facts['pipeline']}")
    call = facts.get("call", {})
    resolution = [call["height"], call["width"]] if "height" in call else None
    model = ModelConfig.model_validate(
        {"family": names[0], "teacher": str(folder), "dtype": settings.dtype, "resolution": resolution}
    )
    device = "cuda" if settings.replica.gpus else "cpu"
    return family_class(names[0]).from_config(model).to(torch.device(device))


def find_base(facts: Mapping[str, Any], settings: ServeSettings) -> str | None:
    """Directory or hub id of the pipeline that a student was distilled from; None when it is not known here."""
    base = str(facts["base"])
    if base in settings.bases:
        return settings.bases[base]
    if base == DEMO_BASE:
        family = next(entry for entry in FAMILIES.values() if entry.pipeline == facts["pipeline"])
        return None if family.demo is None else str(weights_path(family.demo))
    return base if Path(base).is_dir() else None


def _info(name: str, version: str, facts: Mapping[str, Any], artist: Artist, settings: ServeSettings) -> ModelInfo:
    is_teacher = isinstance(artist, Teacher)
    aliases = [alias for alias, target in settings.aliases.items() if target == name]
    return ModelInfo(
        name=name,
        version=version,
        created=int(time.time()),
        kind="teacher" if is_teacher else "student",
        base=str(facts["base"]),
        steps=(settings.teacher_steps,) if isinstance(artist, Teacher) else artist.step_counts,  # type: ignore[attr-defined]
        sizes=offered_sizes(artist.family),
        guidance_scale=settings.teacher_guidance if is_teacher else None,
        aliases=tuple(aliases),
    )


def offered_sizes(family: Family) -> tuple[Size, ...]:
    """The trained size, then a wide and a tall one of about as many pixels, where the network can draw them."""
    height, width = family.image_size
    network, vae = family.teacher.network.config, family.vae.config
    levels = len(getattr(network, "block_out_channels", [0]))
    unit = 2 ** (len(vae["block_out_channels"]) - 1) * (getattr(network, "patch_size", None) or 2 ** (levels - 1))
    unit = max(unit, 64 if min(height, width) >= 512 else unit)
    sizes = [family.image_size]
    for ratio in (4 / 3, 3 / 4):
        wide = unit * round(width * ratio**0.5 / unit)
        tall = unit * round(height / ratio**0.5 / unit)
        if wide and tall and (tall, wide) not in sizes and _fits((tall, wide), network, vae):
            sizes.append((tall, wide))
    return tuple(sizes)


def _fits(size: Size, network: Mapping[str, Any], vae: Mapping[str, Any]) -> bool:
    try:
        latent_size(size, network, vae)
    except ValueError:
        return False
    return True


def fingerprint(folder: Path) -> str:
    """Twelve digits that tell versions apart: of every file's name and content."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:12]
