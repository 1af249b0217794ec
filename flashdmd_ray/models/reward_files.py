"""The files of rewards before anything is loaded, as `teacher_files` does for the other models. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.catalog.rewards import RewardEntry
from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.config_files import check_json, check_module, check_tokenizer, read_json
from flashdmd_ray.models.custom_class import import_class
from flashdmd_ray.models.headers import ModelFileError
from flashdmd_ray.models.locations import local, named_file, resolve
from flashdmd_ray.models.sam_files import file_size
from flashdmd_ray.models.teacher_files import ModelFiles, NamesModels, inspect, part_config
from flashdmd_ray.models.weight_files import DIFFUSERS, TRANSFORMERS, weight_files

LPO_FILE = "state_dict.pt"
LPO_UNUSED = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Weights of the U-Net that LPO's latent rewards do not use."""
_SHAPES = (
    "in_channels",
    "cross_attention_dim",
    "projection_class_embeddings_input_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
)
"""Keys of a denoiser's config.json that say which latents and texts it reads."""


def reward_files(config: NamesModels) -> dict[str, ModelFiles]:
    """Reward models by label. parameters: of all that is loaded; 0 for a server, nothing for a class of the user's.

    Raises ValueError, one line naming the key, the file and the remedy.
    """
    rewards = {}
    for index, reward in enumerate(config.rewards):
        key = f"rewards.{index}.path"
        rewards[reward.label] = _files(key, reward)
        if reward.entry.reads_estimates:
            _check_latents(key, rewards[reward.label], config)
        elif reward.entry.reads_latents:
            _check_form(key, reward.path, rewards[reward.label], config)
    return rewards


def _files(key: str, reward: RewardConfig) -> ModelFiles:
    entry = reward.entry
    if entry.path_is == "url":
        if reward.remote is not None and not os.environ.get("RAY_ADDRESS"):  # workers of another cluster have their own
            check_token(key.replace(".path", "."), reward.remote.token_env)
        return ModelFiles(f"the server at {reward.path}", None, {"": 0})
    if entry.path_is == "class":
        try:
            import_class(reward.path, reward.options)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        return ModelFiles(reward.path)
    if entry.reads_latents and is_lpo(reward.path):
        return _lpo(key, reward.path)
    if entry.reads_estimates:
        return inspect(key, reward.path, entry.demo, _saved_latent_clip)
    if entry.reads_latents:
        return inspect(key, reward.path, entry.demo, _saved_latent_reward)
    files = inspect(key, reward.path, entry.demo, lambda place: _weights(place, entry))
    if files.root is None and entry.model is not None:
        files = ModelFiles(files.source, None, {"": entry.model.parameters})
    base = resolve(reward.base_path, entry.demo)
    if base:
        with_config = local(base) != local(resolve(reward.path, entry.demo))
        inspect(key.replace(".path", ".base"), base, None, lambda root: _base(root, reward, with_config))
    return files


def check_token(section: str, variable: str | None) -> None:
    """Raises ValueError when the variable with a server's token is not set in this process. section: what holds `remote`."""
    if variable is not None and not os.environ.get(variable):
        raise ValueError(
            f"{section}remote.token_env: {variable} is not set in this process; export it where rewards run"
        )


def _weights(place: Path, entry: RewardEntry) -> dict[str, int]:
    """Parameters of a published file, of another one as it is, or of a directory of a whole model."""
    file = named_file(place, entry.files)
    if file is None and entry.files:
        raise ModelFileError(f"{place} holds none of {', '.join(entry.files)}; choose the file itself, or download it")
    if file is None:
        check_module(place / "config.json")
        return {"": sum(weight_files(place, TRANSFORMERS).sizes.values())}
    count = file_size(file)
    as_published = entry.model if file.name in entry.files[:1] else None
    return {"": as_published.parameters if as_published else count}


def _base(root: Path, reward: RewardConfig, with_config: bool) -> dict[str, int]:
    """Tokenizer, image processor and configuration that a reward reads beside its weights."""
    if not root.is_dir():
        raise ModelFileError(f"{root} is no directory; name the one with the tokenizer")
    if with_config and Path(reward.path).is_file() and not reward.entry.files:
        check_json(root / "config.json")
    if reward.kind != "aesthetic":
        check_tokenizer(root)
    return {}


def _saved_latent_reward(place: Path) -> dict[str, int]:
    """Parameters of a directory that `save_latent_reward` wrote, without those that it shares with the teacher."""
    if not place.is_dir():
        raise ModelFileError(f"{place} is one file; name the directory with its config.json")
    config = check_json(place / "config.json")
    for entry in FAMILIES.values():
        base = config.get(f"base_{entry.denoiser}")
        if base is not None:
            weight_files(place / str(base), DIFFUSERS)
    return {"": sum(weight_files(place, TRANSFORMERS).sizes.values())}


def read_latent_clip(place: Path) -> dict[str, Any]:
    """Read the config.json of kind latent_clip: kind and place of its judge, shape and VAE of its latents, width of its stem.

    Raises ModelFileError for another directory.
    """
    saved = check_json(place / "config.json", ("kind", "judge", "latent", "width", "vae"))
    if saved["kind"] not in ("pickscore", "clipscore"):
        raise ModelFileError(
            f"{place / 'config.json'} names a judge of kind '{saved['kind']}'; it must be pickscore or clipscore"
        )
    return saved


def judge_files(key: str, place: Path) -> ModelFiles:
    """The files of the reward whose tower a reward of kind latent_clip has."""
    saved = read_latent_clip(place)
    return _files(key, RewardConfig(kind=saved["kind"], path=saved["judge"], base=saved.get("base")))


def _saved_latent_clip(place: Path) -> dict[str, int]:
    """Parameters of the judge and of the stem."""
    judge = judge_files(f"{place}: judge", place)
    return {"": (judge.total or 0) + sum(weight_files(place, TRANSFORMERS).sizes.values())}


def is_lpo(path: str) -> bool:
    """Return True if a latent reward is in LPO's layout.

    Such a directory, or owner/name/folder on the hub, where nothing else is read from.
    """
    return (Path(path) / LPO_FILE).is_file() or (
        not Path(path).exists() and path.count("/") == 2 and path[0] not in "./~"
    )


def lpo_family(path: str) -> str | None:
    """The family that a latent reward in LPO's layout reads: by its text encoders, on the hub by its name; None when neither says."""
    families = {name: entry for name, entry in FAMILIES.items() if entry.lpo_base is not None}
    if not Path(path).is_dir():
        return next((name for name in families if name in path), None)
    encoders = {folder.name for folder in Path(path).glob("text_encoder*")}
    return next((name for name, entry in families.items() if encoders == set(entry.text_encoders)), None)


def _lpo(key: str, path: str) -> ModelFiles:
    """All that is loaded: the U-Net without its up path, and the text encoders."""
    files = inspect(key, path, None, _lpo_size)
    known = published.LATENT_REWARDS.get(path)
    return files if files.parameters or known is None else ModelFiles(path, files.root, {"": known.parameters})


def _lpo_size(root: Path) -> dict[str, int]:
    check_module(root / "unet" / "config.json", ("block_out_channels",))
    count = sum(sum(weight_files(folder, TRANSFORMERS).sizes.values()) for folder in sorted(root.glob("text_encoder*")))
    sizes = weight_files(root / "unet", DIFFUSERS).sizes
    return {"": count + sum(size for name, size in sizes.items() if not name.startswith(LPO_UNUSED))}


def _check_latents(key: str, files: ModelFiles, config: NamesModels) -> None:
    """Raises ValueError for a reward on latents of another VAE."""
    if files.root is None:
        return
    made_for, vae = read_latent_clip(files.root)["vae"], part_config(config, "vae") or {}
    for name, value in made_for.items():
        if vae.get(name) is not None and float(vae[name]) != value:
            raise ValueError(
                f"{key}: {files.source} reads latents of another VAE ({name} {value:g}, this teacher's has {vae[name]:g}); choose one that "
                "flashdmd reward train made for this teacher"
            )


def _check_form(key: str, path: str, files: ModelFiles, config: NamesModels) -> None:
    """Raises ValueError for a latent reward made of another form of network than the teacher's."""
    family, entry = config.model.family, config.model.entry
    if is_lpo(path):
        made_for = lpo_family(path)
        if made_for is not None and made_for != family:
            raise ValueError(
                f"{key}: {path} is a latent reward for family '{made_for}', but model.family is '{family}'; choose another"
            )
        return
    if files.root is None:
        return
    saved = read_json(files.root / "config.json")
    forms = {other.denoiser for other in FAMILIES.values()} & saved.keys()
    if forms and entry.denoiser not in forms:
        raise ValueError(
            f"{key}: {files.source} is a latent reward on a {forms.pop()}, but model.family '{family}' has a "
            f"{entry.denoiser}; choose one that was trained for this family"
        )
    if forms:
        _check_shapes(
            key,
            files.source,
            saved[entry.denoiser],
            part_config(config, entry.denoiser) or {},
            entry.lpo_base is not None,
        )


def _check_shapes(key: str, source: str, own: Mapping[str, Any], teacher: Mapping[str, Any], has_lpo: bool) -> None:
    for name in _SHAPES:
        if own.get(name) is not None and teacher.get(name) is not None and own[name] != teacher[name]:
            other = "LPO's, such as casiatao/LRM/lrm_sdxl, or " if has_lpo else ""
            raise ValueError(
                f"{key}: the latent reward of the {source} was made for another teacher ({name} {own[name]}, this has {teacher[name]}); "
                f"name {other}one that flashdmd reward train made for this teacher, or use kind pickscore "
                "with yuvalkirstain/PickScore_v1"
            )
