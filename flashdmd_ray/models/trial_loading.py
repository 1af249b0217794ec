"""Loading on trial: the loaders of every model that is on this machine, without reading a value. Imports torch when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flashdmd_ray.config import Config, ModelConfig, RewardConfig
from flashdmd_ray.models import family_class
from flashdmd_ray.models.config_files import read_json
from flashdmd_ray.models.locations import local, resolve
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.models.sam_files import sam_files
from flashdmd_ray.models.teacher_files import ModelFiles, NamesModels, inspect, teacher_files


def try_loading(
    config: NamesModels, rewards: Sequence[RewardConfig] = (), start: str | None = None, sam_side: int | None = None
) -> None:
    """Run the loaders of the teacher, of `rewards` and of what else is asked for, as a job will, for names and shapes of weights.

    start: `generator.start`. sam_side: pixels of the images that Segment Anything reads; None leaves it out. Not tried: the package's own
    models, those that the hub still has to send, and folders whose config.json describes no network. Raises ValueError, one line naming
    the file, what is wrong and the remedy.
    """
    files = reward_files(config) if rewards else {}
    trials: list[Callable[[], None]] = [
        partial(_reward, reward) for reward in rewards if _reward_is_here(reward, files[reward.label])
    ]
    if start is not None:
        inspect("generator.start", start, None, lambda _: {})
    if _is_here(teacher_files(config), config.model.teacher, config.model.entry.denoiser):
        trials.append(partial(_teacher, config.model, start))
    if isinstance(config, Config) and sam_side is not None and _is_here(sam_files(config), config.model.sam):
        trials.append(partial(_sam, config.model.sam, sam_side))
    if trials:
        from flashdmd_ray.models.weight_reading import without_values

        with without_values():
            for trial in reversed(trials):
                trial()


def _teacher(model: ModelConfig, start: str | None) -> None:
    family = family_class(model.family).from_config(model)
    if start is not None and local(start) is not None:
        from flashdmd_ray.models.start_weights import load_start

        load_start(family, start)


def _reward(reward: RewardConfig) -> None:
    from flashdmd_ray.models.rewards import reward_model

    reward_model(reward)


def _sam(path: str, side: int) -> None:
    from flashdmd_ray.models.sam import load_sam_encoder

    load_sam_encoder(path, side)


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
