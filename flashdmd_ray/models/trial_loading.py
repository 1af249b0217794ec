"""Loading on trial: the loaders of every model that is on this machine, without reading a value. Imports torch when it is called."""

from __future__ import annotations

from pathlib import Path

from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.models import family_class
from flashdmd_ray.models.config_files import read_json
from flashdmd_ray.models.locations import local, resolve
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.models.teacher_files import ModelFiles, NamesModels, inspect, teacher_files


def try_loading(config: NamesModels) -> None:
    """Run the loaders of teacher, rewards, Segment Anything and `generator.start` as a job will, for names and shapes of their weights.

    Left out are the package's own models, those that the hub still has to send, and folders whose config.json describes no network.
    Raises ValueError, one line naming the file, what is wrong and the remedy.
    """
    start = config.generator.start if isinstance(config, Config) else None
    teacher = _is_here(teacher_files(config), config.model.teacher, config.model.entry.denoiser)
    rewards = [reward for reward, files in _rewards(config) if _reward_is_here(reward, files)]
    if start is not None:
        inspect("generator.start", start, None, lambda _: {})
    if not teacher and not rewards:
        return
    from flashdmd_ray.models.weight_reading import without_values

    with without_values():
        if teacher:
            family = family_class(config.model.family).from_config(config.model)
            if start is not None and local(start) is not None:
                from flashdmd_ray.models.start_weights import load_start

                load_start(family, start)
        for reward in rewards:
            from flashdmd_ray.models.rewards import reward_model

            reward_model(reward)


def _rewards(config: NamesModels) -> list[tuple[RewardConfig, ModelFiles]]:
    if isinstance(config, Config) and not config.preference.updates:
        return []
    files = reward_files(config)
    return [(reward, files[reward.label]) for reward in config.rewards]


def _reward_is_here(reward: RewardConfig, files: ModelFiles) -> bool:
    base = resolve(reward.base_path, reward.entry.demo)
    return _is_here(files, reward.path) and (not base or local(base) is not None)


def _is_here(files: ModelFiles, path: str, folder: str = "") -> bool:
    if path == "demo" or files.root is None or not files.parameters:
        return False
    if Path(path).is_file():
        return True
    file = files.root / folder / "config.json"
    return not file.is_file() or len(read_json(file)) > 2  # two keys describe no network
