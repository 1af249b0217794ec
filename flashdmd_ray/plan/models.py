"""The models of a configuration: their architecture from the config.json beside their weights, or as published."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FAMILIES, latent_size
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.models.demo_parts import refuse_demo_parts
from flashdmd_ray.models.reward_files import is_lpo, judge_files, reward_files
from flashdmd_ray.models.sam_files import sam_files
from flashdmd_ray.models.single_file import DENOISER, VAE
from flashdmd_ray.models.teacher_files import ModelFiles, teacher_files

Json = Mapping[str, Any]
OFFICIAL_SAM = re.compile(r"sam_(vit_[blh])_\w+\.pth")


@dataclass(frozen=True)
class Model:
    """config: its config.json; None when it says too little. parameters: None when only loading can tell."""

    source: str
    config: Json | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Models:
    """denoiser, vae: of the teacher. texts: its text encoders. sam: None without a pixel discriminator. rewards: by label.

    latent, image: shapes (C, h, w) and (H, W); None when unknown. absent: what must be downloaded before a run can start, one line each.
    """

    denoiser: Model
    vae: Model
    texts: tuple[Model, ...]
    sam: Model | None
    rewards: Mapping[str, Model]
    latent: tuple[int, int, int] | None
    image: tuple[int, int] | None
    absent: tuple[str, ...] = field(default=())

    @property
    def text_parameters(self) -> int | None:
        counts = [model.parameters for model in self.texts]
        return None if not counts or None in counts else sum(count for count in counts if count is not None)


def models_of(config: Config) -> Models:
    """Raises ValueError, one line naming the key or file and the remedy, for missing or damaged model files."""
    entry, model = FAMILIES[config.model.family], config.model
    files = teacher_files(config)
    refuse_demo_parts(config)
    encoders = [*entry.text_encoders, *(entry.optional_encoders if model.t5 else ())]
    denoiser = _part(model.teacher, model.teacher_config, files, entry.denoiser, DENOISER)
    texts = tuple(_part(model.teacher, model.teacher_config, files, name, name) for name in encoders)
    vae = _part(model.teacher, model.teacher_config, files, VAE, VAE)
    if model.vae is not None:
        known = published.VAES.get(model.vae)
        config_json = _json(Path(model.vae) / "config.json") or (known.config if known else None)
        vae = Model(model.vae, config_json, files.parameters.get(VAE) or (known.parameters if known else None))
    latent = image = None
    if denoiser.config and vae.config and "sample_size" in denoiser.config and "block_out_channels" in vae.config:
        height, width, pixels = latent_size(model.resolution, denoiser.config, vae.config)
        latent = (int(denoiser.config["in_channels"]), height, width)
        image = (height * pixels, width * pixels)
    sam, absent = (None, ()) if config.adversarial.space == "latent" else _sam(config)
    rewards = reward_files(config) if config.preference.updates else {}
    return Models(
        denoiser,
        vae,
        texts,
        sam,
        {reward.label: _reward(reward, rewards[reward.label]) for reward in config.rewards if rewards},
        latent,
        image,
        absent,
    )


def _part(teacher: str, configs: str | None, files: ModelFiles, folder: str, part: str) -> Model:
    known = published.PIPELINES.get(configs or teacher)
    as_published = known.parts.get(folder) if known else None
    root = Path(configs) if configs is not None else files.root
    config = None if root is None else _json(root / folder / "config.json")
    parameters = files.parameters.get(part)
    if as_published is not None:
        return Model(files.source, config or as_published.config, parameters or as_published.parameters)
    return Model(files.source, config, parameters)


def _sam(config: Config) -> tuple[Model, tuple[str, ...]]:
    """A checkpoint of an official name is known before it is there."""
    path = Path(config.model.sam)
    name = OFFICIAL_SAM.fullmatch(path.name)
    official = published.SAM[name[1]] if name else None
    if official is not None and not path.is_file():
        absent = f"model.sam: {path} does not exist; correct the path or download the checkpoint"
        return Model(str(path), official.config, official.parameters), (absent,)
    files = sam_files(config)
    if official is None and path.is_file():
        official = next((sam for sam in published.SAM.values() if _near(sam.parameters, files.total)), None)
    sizes = official.config if official else _json((files.root or path) / "config.json")
    return Model(files.source, sizes if sizes and "embed_dim" in sizes else None, files.total), ()


def _near(count: int, floats: int | None) -> bool:
    """A .pth file is its weights and a little more."""
    return floats is not None and 0 <= floats - count < count // 100


def _reward(reward: RewardConfig, files: ModelFiles) -> Model:
    as_published, known = reward.entry.model, published.CLIP_MODELS.get(reward.path)
    if as_published is not None:
        of_that_size = files.total == as_published.parameters
        return Model(files.source, as_published.config if of_that_size else None, files.total)
    if reward.entry.reads_latents and is_lpo(reward.path):
        return _lpo(reward.path, files)
    root = files.root
    if root is not None and reward.entry.reads_estimates:
        root = judge_files(reward.path, root).root
    config = None if root is None else _json(root / "config.json")
    if known is None:
        return Model(files.source, config, files.total)
    return Model(files.source, config or known.config, files.total or known.parameters)


def _lpo(path: str, files: ModelFiles) -> Model:
    known = published.LATENT_REWARDS.get(path)
    if files.root is None:
        return Model(files.source, known.config if known else None, files.total)
    text = _json(files.root / "text_encoder_2" / "config.json") or _json(files.root / "text_encoder" / "config.json")
    width = (text or {}).get("projection_dim")
    unet = _json(files.root / "unet" / "config.json")
    return Model(
        files.source, {"unet": unet, "text_width": width, "lpo": True} if unet and width else None, files.total
    )


def _json(path: Path) -> Json | None:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and len(tree) > 2 else None  # two keys describe no network
