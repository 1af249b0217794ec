"""Micro-batches of each role: the fewest whose planned memory fits the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.plan.fit import fits, room_of
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import models_of


def fit_micro_batches(config: Config) -> Config:
    """Replace `auto` in `engine.accumulation` and `adversarial.accumulation` by numbers, where the roles are on GPUs of a known size.

    A process needs the most of its roles' calls, so the one setting is chosen with the other at its most. Where nothing fits, it is the
    most, and the check of the plan says what else would help.
    """
    keys = [key for key in ("engine", "adversarial") if getattr(config, key).accumulation == "auto"]
    if not keys or all(room_of(config, group) is None for group in ("learner", "discriminator")):
        return config
    models = models_of(config)
    most = {key: list(_numbers(config, key))[-1] for key in keys}
    chosen = dict(most)
    for key in keys:
        for number in _numbers(config, key):
            tried = _with(config, most | {key: number})
            step = step_of(tried, models, repeats=1)
            if step is None:
                return config
            if fits(tried, models, step):
                chosen[key] = number
                break
    return _with(config, chosen)


def _numbers(config: Config, key: str) -> Iterator[int]:
    """Numbers of equal micro-batches, the fewest first."""
    placement = config.placement
    if key == "adversarial":
        size = config.batch // placement.of("discriminator").workers
    else:
        size = config.batch // placement.learner.workers
        if config.preference.updates:
            size = gcd(size, config.preference.batch // placement.learner.workers)
    yield from (number for number in range(1, size + 1) if size % number == 0)


def _with(config: Config, accumulation: dict[str, int]) -> Config:
    tree: dict[str, Any] = config.model_dump(mode="json")
    for key, number in accumulation.items():
        tree[key]["accumulation"] = number
    return parse_config(tree)
