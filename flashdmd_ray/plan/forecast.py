"""Predicted time of a run on given GPUs, and a placement that would waste less of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.plan.fit import fits
from flashdmd_ray.plan.hardware import GPUS, UTILISATION, Gpu
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.works import Step

IDLE = 0.3
"""Share of the GPUs' time above which another placement is looked for."""
TRIED = 4
"""Placements that are planned in full; they are chosen by a quick estimate."""


@dataclass(frozen=True)
class Forecast:
    """seconds: of a mean step. before: of a step before `start`, where preference updates begin. gpus: of the job.
    idle: share of their time. images: distilled a second. utilisation: operations over what the GPUs could do.
    hours: GPU-hours of the run. cost: dollars of the run."""

    gpu: Gpu
    gpus: float
    seconds: float
    before: float
    start: int
    idle: float
    images: float
    utilisation: float
    hours: float
    cost: float

    def line(self) -> str:
        """All of it in one line."""
        per_step = self.seconds * self.gpus / 3600
        before = f" ({self.before:.3g} s before step {self.start:,})" if self.start else ""
        return (
            f"predicted: {self.seconds:.3g} s a step{before} on {self.gpus:g} x {self.gpu.name} at {UTILISATION:.0%}, "
            f"idle {self.idle:.0%}, {self.images:.3g} images/s, MFU {self.utilisation:.0%}, {100 * per_step:.3g} GPU-hours per 100 steps; "
            f"the run {self.hours:,.3g} GPU-hours, about ${self.cost:,.0f}"
        )


def gpu_of(config: Config, name: str | None) -> Gpu | None:
    """The GPU of that name, or the one that the configuration's memory speaks of; None for a run on CPUs."""
    if name is not None:
        return GPUS[name]
    sizes = [placed.gpu_memory_gib for placed in config.placement.groups() if placed.gpus]
    if not sizes:
        return None
    smallest = min((size for size in sizes if size is not None), default=80.0)
    return GPUS["rtx4090" if smallest <= 24 else "h100" if smallest <= 80 else "h200"]


def forecast_of(config: Config, step: Step, gpu: Gpu) -> Forecast | None:
    """None for a run without GPUs, and where the time of a step is not known."""
    counts = gpus_of(config)
    gpus = sum(counts.values())
    if not gpus or step.timing is None:
        return None
    seconds = step.timing.seconds
    busy = sum(counts.get(group, 0.0) * share for group, share in step.timing.busy.items())
    flops, _ = operations_of(config, step)
    start = min(config.preference.start_step, config.steps) if config.preference.updates else 0
    hours = (step.timing.before * start + seconds * (config.steps - start)) * gpus / 3600
    return Forecast(
        gpu=gpu,
        gpus=gpus,
        seconds=seconds,
        before=step.timing.before,
        start=start,
        idle=max(0.0, 1 - busy / gpus),
        images=config.batch / seconds if config.preference.distill else 0.0,
        utilisation=flops / (seconds * gpus * gpu.matmul),
        hours=hours,
        cost=hours * gpu.price,
    )


def operations_of(config: Config, step: Step) -> tuple[float, float]:
    """Operations of a mean step on all ranks together, and of one before preference updates begin."""
    ranks = {
        work.group: 1 if config.runtime == "local" else config.placement.of(work.group).workers for work in step.works
    }
    return (
        sum(work.flops * ranks[work.group] for work in step.works),
        sum(work.before * ranks[work.group] for work in step.works),
    )


def gpus_of(config: Config) -> dict[str, float]:
    """GPUs of each group; "local": of the one process."""
    if config.runtime == "local":
        return {"local": float(any(placed.gpus for placed in config.placement.groups()))}
    names = ["learner", *([] if config.adversarial.space == "latent" else ["discriminator"])]
    if config.preference.updates:
        names += ["rollout", *config.reward_pools]
    return {
        name: config.placement.of(name).workers * config.placement.of(name).gpus
        for name in dict.fromkeys(map(config.placement.home, names))
        if config.placement.of(name).gpus
    }


def critical_path(step: Step, longest: int = 4) -> str:
    """The calls that a step waits for, longest first."""
    assert step.timing is not None, "asked for where times are known"
    named = [f"{call} {seconds:.2g} s" for call, seconds in step.timing.critical[:longest]]
    return f"a step waits for: {', '.join(named)}"


def better_placement(config: Config, models: Models, step: Step, found: Forecast) -> str | None:
    """Another division of the same GPUs with a shorter step, as a line; None when none was found."""
    best, chosen = found, None
    for changed in _divisions(config, step)[:TRIED]:
        changed_step = step_of(changed, models, found.gpu)
        if changed_step is None or not fits(changed, models, changed_step):
            continue
        tried = forecast_of(changed, changed_step, found.gpu)
        if tried is not None and tried.seconds < 0.95 * best.seconds:
            best, chosen = tried, changed
    if chosen is None:
        return None
    counts = {name: chosen.placement.of(name).workers for name in ("learner", "discriminator", "rollout")}
    together = chosen.beside_learner("rollout")
    how = (
        f"everything within {counts['learner']} learners"
        if together
        else ", ".join(f"{n} {w}" for n, w in counts.items())
    )
    return f"a shorter step with {how}: {best.seconds:.3g} s, idle {best.idle:.0%}"


def _divisions(config: Config, step: Step) -> Sequence[Config]:
    """Other placements on the same GPUs, the most promising first: all roles within the learner, or divided among its three groups."""
    if config.runtime == "local" or step.timing is None or config.adversarial.space == "latent":
        return []
    if config.beside_learner("discriminator") or config.beside_learner("rollout"):
        return []
    gpus = int(sum(gpus_of(config).values()))
    inside = {name: {"within": "learner"} for name in ("discriminator", "rollout", "reward")}
    together = _with_placement(config, {"learner": {"workers": gpus, "gpus": 1}, **inside})
    placed = config.placement
    load = {
        group: step.timing.busy.get(group, 0.0) * placed.of(group).workers
        for group in ("learner", "discriminator", "rollout")
    }
    ranked: list[tuple[float, Config]] = [] if together is None else [(0.0, together)]
    for workers in _shares(sum(placed.of(group).workers for group in load)):
        counts = dict(zip(load, workers, strict=True))
        changed = _with_placement(config, {group: {"workers": count} for group, count in counts.items()})
        if changed is not None and changed != config:
            ranked.append((max(load[group] / count for group, count in counts.items()), changed))
    return [changed for _, changed in sorted(ranked, key=lambda each: each[0])]


def _shares(total: int) -> Iterator[tuple[int, int, int]]:
    for learner in range(1, total - 1):
        for discriminator in range(1, total - learner):
            yield learner, discriminator, total - learner - discriminator


def _with_placement(config: Config, changes: dict[str, dict[str, Any]]) -> Config | None:
    placement: dict[str, Any] = config.placement.model_dump(mode="json")
    for group, change in changes.items():
        placement[group] |= change
    try:
        return parse_config(config.model_dump(mode="json") | {"placement": placement})
    except ValueError:  # ranks that cannot share the batch
        return None
