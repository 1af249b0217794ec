"""Everything that can be known to be wrong before work begins."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from flashdmd_ray.config import Config
from flashdmd_ray.data.datasets import data_faults
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.plan.fit import check_fit
from flashdmd_ray.plan.models import Models, models_of
from flashdmd_ray.plan.parts import Part, parts_of_models, published_bytes
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.lock import check_free
from flashdmd_ray.run.shared_memory import FOLDER, store_bytes
from flashdmd_ray.run.sockets import listen
from flashdmd_ray.run.storage import check_checkpoint_root
from flashdmd_ray.run.tracking import tracking_uri
from flashdmd_ray.run.variables import check_ray_address, ray_address

SAM_SIZE = (1024, 1024)
"""Images that Segment Anything was made for."""
STORED_VERSIONS = 2
"""Published versions that can be in the object store at once: the newest, and the one that rollouts still read."""
STORE_FILLED = 0.8
"""Part of the object store from which on Ray moves objects to a disk."""


def check(config: Config) -> tuple[RunDirectory, list[Part]]:
    """Everything that can be known to be wrong before work begins: run folder, data, model files, memory of GPUs. Creates nothing.

    Raises ValueError, one line for each fault, naming the key or file and the remedy.
    """
    run, parts, models = _inspected(config)
    check_free(run.path)
    if config.runtime == "ray" and config.control.enabled:
        listen(config.control).close()
    if missing := _missing(config, models):
        raise ValueError("\n".join(missing))
    check_fit(config, models, parts)
    check_store(config, models)
    return run, parts


def check_store(config: Config, models: Models) -> None:
    """Raises ValueError when published weights do not fit the object store of a private Ray, which would put them on a disk."""
    if config.runtime != "ray" or ray_address(os.environ) is not None:
        return
    published, room = published_bytes(config, models), store_bytes()
    if STORED_VERSIONS * published > STORE_FILLED * room:
        needs = STORED_VERSIONS * published / STORE_FILLED / 2**30
        raise ValueError(
            f"{FOLDER}: publishing weights to the rollouts needs an object store of {needs:.1f} GiB, and this machine has room for "
            f"{room / 2**30:.1f} (half of what is free in {FOLDER}, 30 % of memory at most); make it larger (in a container --shm-size), "
            "or set placement.rollout.within to learner, which publishes nothing"
        )


def preview(config: Config) -> tuple[RunDirectory, list[Part], list[str]]:
    """Check a run for `--dry-run`. Data or a checkpoint of Segment Anything may be still to come: the last list names them."""
    run, parts, models = _inspected(config)
    return run, parts, _missing(config, models)


def _missing(config: Config, models: Models) -> list[str]:
    """List what must be brought here before a run can start, one line each."""
    return [*models.absent, *data_faults(config), *missing_packages(config)]


def missing_packages(config: Config) -> list[str]:
    """One line for each optional package that a run needs and this machine lacks; machines of another cluster may have it."""
    rewards = config.rewards if config.preference.updates else ()
    hub = config.data.source.startswith("hf:") or (Path(config.data.source) / "dataset_info.json").is_file()
    needs = [("engine.optimizer", "bitsandbytes", "low-memory")] if config.engine.optimizer == "adamw_8bit" else []
    needs += [
        (f"rewards.{n}.kind", "open_clip", "rewards") for n, r in enumerate(rewards) if r.kind.startswith("hpsv2")
    ]
    needs += [("data.source", "datasets", "hub")] if hub else []
    needs += [("tracking.tensorboard", "tensorboard", "tensorboard")] if config.tracking.tensorboard else []
    needs += [("tracking.wandb", "wandb", "wandb")] if config.tracking.wandb else []
    return [
        f"{key}: needs the package {package}, which is not installed; pip install 'flashdmd-ray[{extra}]'"
        for key, package, extra in needs
        if importlib.util.find_spec(package) is None and not os.environ.get("RAY_ADDRESS")
    ]


def _inspected(config: Config) -> tuple[RunDirectory, list[Part], Models]:
    if config.runtime == "ray":
        check_ray_address(os.environ)
    run = RunDirectory.check(config.run, config)
    check_checkpoint_root(config, run.path)
    tracking_uri(config.tracking, run)
    models = models_of(config)
    rewards = config.rewards if config.preference.updates else ()
    with_sam = config.adversarial.space == "pixel" and not models.absent
    side = max(models.image or SAM_SIZE)
    try_loading(config, rewards, config.generator.start, side if with_sam else None)
    parts = parts_of_models(config, models)
    return run, parts, models
