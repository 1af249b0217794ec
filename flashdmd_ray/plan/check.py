"""Everything that can be known to be wrong before work begins."""

from __future__ import annotations

import os

from flashdmd_ray.config import Config
from flashdmd_ray.data.datasets import data_faults
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.plan.fit import check_fit
from flashdmd_ray.plan.models import Models, models_of
from flashdmd_ray.plan.parts import Part, parts_of_models
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.lock import check_free
from flashdmd_ray.run.storage import check_checkpoint_root
from flashdmd_ray.run.tracking import tracking_uri
from flashdmd_ray.run.variables import check_ray_address

SAM_SIZE = (1024, 1024)
"""Images that Segment Anything was made for."""


def check(config: Config) -> tuple[RunDirectory, list[Part]]:
    """Everything that can be known to be wrong before work begins: run folder, data, model files, memory of GPUs. Creates nothing.

    Raises ValueError, one line for each fault, naming the key or file and the remedy.
    """
    if config.runtime == "ray":
        check_ray_address(os.environ)
    run, parts, models = _inspected(config)
    check_free(run.path)
    if missing := [*models.absent, *data_faults(config)]:
        raise ValueError("\n".join(missing))
    check_fit(config, models, parts)
    return run, parts


def preview(config: Config) -> tuple[RunDirectory, list[Part], list[str]]:
    """As `check` for `--dry-run`, which plans a run whose data or checkpoint of Segment Anything is still to come: those are named last."""
    run, parts, models = _inspected(config)
    return run, parts, [*models.absent, *data_faults(config)]


def _inspected(config: Config) -> tuple[RunDirectory, list[Part], Models]:
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
