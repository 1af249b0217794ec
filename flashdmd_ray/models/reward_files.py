"""The files of rewards before anything is loaded, as `teacher_files` does for the other models. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.teacher_files import (
    ModelFiles,
    NamesModels,
    check_json,
    count_parameters,
    header_sizes,
    inspect_model,
    local_snapshot,
    read_header,
    read_json,
)

LPO_FILE = "state_dict.pt"
LPO_UNUSED = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Weights of the U-Net that LPO's latent rewards do not use."""


def reward_files(config: NamesModels) -> dict[str, ModelFiles]:
    """By label, the reward models. parameters: of all that is loaded; 0 for a server, nothing for a class of the user's.

    Raises ValueError, one line naming the key, the file and the remedy.
    """
    found = {}
    for index, reward in enumerate(config.rewards):
        key = f"rewards.{index}.path"
        files = _files(key, reward)
        if reward.kind == "latent":
            _check_form(key, reward.path, files, config.model.family)
        found[reward.label] = files
    return found


def _files(key: str, reward: RewardConfig) -> ModelFiles:
    if reward.kind == "remote":
        return ModelFiles(f"the server at {reward.path}", None, {"": 0})
    if reward.kind == "custom":
        _check_module(key, reward.path)
        return ModelFiles(reward.path)
    kind = published.REWARD_KINDS.get(reward.kind)
    if kind is not None and Path(reward.path).is_file():
        return _one_file(key, Path(reward.path), kind)
    if kind is not None and kind.files:
        return _directory(key, reward.path, kind)
    if reward.kind == "latent" and is_lpo(reward.path):
        return _lpo(key, reward.path)
    return inspect_model(key, reward.path, "latent_reward" if reward.kind == "latent" else "reward", ("",), {})


def is_lpo(path: str) -> bool:
    """Whether a latent reward is in LPO's layout: such a directory, or owner/name/folder on the hub, where nothing else is read from."""
    return (Path(path) / LPO_FILE).is_file() or (not Path(path).exists() and path.count("/") == 2)


def _lpo(key: str, path: str) -> ModelFiles:
    """All that is loaded: the U-Net without its up path, and the text encoders."""
    if not Path(path).exists():
        known = published.LATENT_REWARDS.get(path)
        if known is None:
            local_snapshot(key, "/".join(path.split("/")[:2]), "")
        return ModelFiles(path, None, {"": known.parameters} if known else {})
    root = Path(path)
    try:
        check_json(root / "unet" / "config.json", ("block_out_channels",))
        count = sum(count_parameters(folder) for folder in sorted(root.glob("text_encoder*")))
        for file in sorted((root / "unet").glob("*.safetensors")):
            kept = (n for name, n in header_sizes(file).items() if not name.startswith(LPO_UNUSED))
            count += sum(kept)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return ModelFiles(path, root, {"": count})


def _one_file(key: str, file: Path, kind: published.RewardKind) -> ModelFiles:
    """A published model's size is known; of another one it is the file's."""
    try:
        counted = read_header(file) if file.suffix == ".safetensors" else file.stat().st_size // 4
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    known = kind.model if file.name in kind.files[:1] else None
    return ModelFiles(str(file), None, {"": known.parameters if known else counted})


def _directory(key: str, path: str, kind: published.RewardKind) -> ModelFiles:
    """A folder that holds the weights as one file, or a hub repository, of which the published size is taken."""
    assert kind.model is not None, "kinds of one file are published models"
    if not Path(path).is_dir():
        local_snapshot(
            key, "/".join(path.split("/")[:2]), ""
        )  # refuses what is neither here, nor known, nor on the hub
        return ModelFiles(path, None, {"": kind.model.parameters})
    names = [name for name in kind.files if (Path(path) / name).is_file()]
    if not names:
        raise ValueError(f"{key}: {path} holds none of {', '.join(kind.files)}; choose the file itself, or download it")
    return _one_file(key, Path(path) / names[0], kind)


def _check_module(key: str, path: str) -> None:
    module = path.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None:
        raise ValueError(f"{key}: there is no module {module}; install it, or add its folder to PYTHONPATH")


def _check_form(key: str, path: str, files: ModelFiles, family: str) -> None:
    """Raises ValueError for a latent reward made of another form of network than the family's."""
    if is_lpo(path):
        made_for = "sdxl" if "sdxl" in path or (Path(path) / "text_encoder_2").is_dir() else "sd15"
        if made_for != family:
            raise ValueError(
                f"{key}: {path} is a latent reward for family '{made_for}', but model.family is '{family}'; choose another"
            )
        return
    if files.root is None:
        return
    forms = {entry.denoiser for entry in FAMILIES.values()}
    found = forms & read_json(files.root / "config.json").keys()
    if found and FAMILIES[family].denoiser not in found:
        raise ValueError(
            f"{key}: {files.source} is a latent reward on a {found.pop()}, but model.family '{family}' has a "
            f"{FAMILIES[family].denoiser}; choose one that was trained for this family"
        )
