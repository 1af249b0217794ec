"""The files of rewards before anything is loaded, as `teacher_files` does for the other models. Imports no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.catalog.rewards import RewardEntry
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
        if reward.entry.reads_latents:
            _check_form(key, reward.path, files, config.model.family)
        found[reward.label] = files
    return found


def _files(key: str, reward: RewardConfig) -> ModelFiles:
    entry = reward.entry
    if entry.path_is == "url":
        return ModelFiles(f"the server at {reward.path}", None, {"": 0})
    if entry.path_is == "class":
        _check_module(key, reward.path)
        return ModelFiles(reward.path)
    if entry.reads_latents and is_lpo(reward.path):
        return _lpo(key, reward.path)
    if Path(reward.path).is_file() and not entry.reads_latents:
        return _one_file(key, Path(reward.path), entry)
    if entry.files:
        return _directory(key, reward.path, entry)
    return inspect_model(key, reward.path, entry.demo, ("",), {})


def is_lpo(path: str) -> bool:
    """Whether a latent reward is in LPO's layout: such a directory, or owner/name/folder on the hub, where nothing else is read from."""
    return (Path(path) / LPO_FILE).is_file() or (not Path(path).exists() and path.count("/") == 2)


def lpo_family(path: str) -> str | None:
    """The family that a latent reward in LPO's layout reads: by its text encoders, on the hub by its name; None when neither says."""
    families = {name: entry for name, entry in FAMILIES.items() if entry.lpo_base is not None}
    if not Path(path).is_dir():
        return next((name for name in families if name in path), None)
    encoders = {folder.name for folder in Path(path).glob("text_encoder*")}
    return next((name for name, entry in families.items() if encoders == set(entry.text_encoders)), None)


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


def _one_file(key: str, file: Path, entry: RewardEntry) -> ModelFiles:
    """A published model's size is known; of another one it is the file's."""
    try:
        counted = read_header(file) if file.suffix == ".safetensors" else file.stat().st_size // 4
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    known = entry.model if file.name in entry.files[:1] else None
    return ModelFiles(str(file), None, {"": known.parameters if known else counted})


def _directory(key: str, path: str, entry: RewardEntry) -> ModelFiles:
    """A folder that holds the weights as one file, or a hub repository, of which the published size is taken."""
    assert entry.model is not None, "kinds of one file are published models"
    if not Path(path).is_dir():
        local_snapshot(
            key, "/".join(path.split("/")[:2]), ""
        )  # refuses what is neither here, nor known, nor on the hub
        return ModelFiles(path, None, {"": entry.model.parameters})
    names = [name for name in entry.files if (Path(path) / name).is_file()]
    if not names:
        raise ValueError(
            f"{key}: {path} holds none of {', '.join(entry.files)}; choose the file itself, or download it"
        )
    return _one_file(key, Path(path) / names[0], entry)


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
        made_for = lpo_family(path)
        if made_for is not None and made_for != family:
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
