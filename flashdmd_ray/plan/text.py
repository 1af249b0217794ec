"""The text of `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence

from flashdmd_ray.config import Config, GroupConfig
from flashdmd_ray.data.datasets import describe_data
from flashdmd_ray.plan.fit import GIB, Process, processes, room_of
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.parts import Part
from flashdmd_ray.plan.roles import Work, work_of
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.storage import checkpoint_root, children

UNKNOWN = "on loading"


def describe(config: Config, run: RunDirectory, parts: Sequence[Part]) -> str:
    """The text of `--dry-run`: roles, parameters, memory and operations of each role, placement and the update schedule."""
    state = "resumes from its newest checkpoint" if children(checkpoint_root(config, run.path)) else "new"
    models = models_of(config)
    works = work_of(config, models)
    absent = list(models.absent)
    try:
        data = describe_data(config.data)
    except ValueError as error:
        data = [f"source: {config.data.source}"]
        absent.append(str(error))
    sections = [
        ("run", [f"{run.path} ({state}), runtime {config.runtime}, seed {config.seed}"]),
        ("roles", table(["role", "worker group", "parameters", "trained", "from"], [_row(part) for part in parts])),
        ("memory and operations of one rank", _costs(parts, works)),
        ("placement", _placement(config, parts, works)),
        ("data", data),
        ("schedule", _schedule(config)),
    ]
    if absent:
        sections.append(("before it can run", absent))
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def _row(part: Part) -> list[str]:
    small = part.parameters == 0 and part.trained == "yes"  # a head; a server's model has none here
    count = UNKNOWN if part.parameters is None else "small" if small else f"{part.parameters:,}"
    return [part.name, part.group, count, part.trained, part.source]


def _costs(parts: Sequence[Part], works: Sequence[Work] | None) -> list[str]:
    """One row for each part: what it keeps, what it needs while it works, and the operations of a mean step."""
    head = ["role", "worker group", "weights", "gradients", "optimizer", "activations", "TFLOP per step"]
    if works is None:
        return ["known when every model is on this machine, or is a published one"]
    done = {(work.group, work.part): work for work in works}
    rows = []
    for part in parts:
        work = done.get((part.group, part.name))
        nothing = "0" if part.held is not None else UNKNOWN  # a reward of the user's own
        kept = (
            [UNKNOWN] * 3
            if part.held is None
            else map(_mib, (part.held.weights, part.held.gradients, part.held.optimizer))
        )
        rows.append(
            [
                part.name,
                part.group,
                *kept,
                _mib(work.peak) if work else nothing,
                f"{work.flops / 1e12:,.3g}" if work else nothing,
            ]
        )
    host = sum(part.held.host for part in parts if part.held is not None)
    lines = table(head, rows)
    lines.append("memory in MiB; optimizer: masters, moments and averages; activations: the most at any time")
    if host:
        lines.append(f"in host memory: {_mib(host)} MiB of the optimizer")
    total = sum(work.flops for work in works)
    return [*lines, f"operations of one rank of each group together: {total / 1e12:,.3g} TFLOP per step"]


def _mib(size: float) -> str:
    mib = size / 2**20
    return "0" if not size else f"{mib:,.1f}" if mib < 100 else f"{mib:,.0f}"


def _placement(config: Config, parts: Sequence[Part], works: Sequence[Work] | None) -> list[str]:
    """One row for each kind of process."""
    planned = processes(config, parts, works)
    if config.runtime == "local":
        process = planned["local"]
        room = room_of(config, "learner")
        memory = UNKNOWN if process is None else _memory(process, config.placement.learner, room)
        return [f"one process for all roles, {_threads(config)}, memory {memory}"]
    rows = []
    for group, process in planned.items():
        placed = config.placement.of(group)
        memory = UNKNOWN if process is None else _memory(process, placed, room_of(config, group))
        rows.append([group, str(placed.workers), f"{placed.cpus:g}", f"{placed.gpus:g}", memory])
    lines = table(["worker group", "workers", "CPUs each", "GPUs each", "memory each"], rows)
    return [*lines, f"{_threads(config)} in every process", _in_all(config, planned)]


def _memory(process: Process, placed: GroupConfig, room: float | None) -> str:
    if not placed.gpus:
        return f"{process.cpu_gib:.1f} GiB"
    of = "" if room is None else f" of {room:.1f}"
    host = f", {process.host / GIB:.1f} GiB in host memory" if process.host else ""
    return f"{process.gpu_gib:.1f}{of} GiB GPU{host}"


def _in_all(config: Config, planned: dict[str, Process | None]) -> str:
    total = 0.0
    for group, process in planned.items():
        if process is None:
            return "memory in all: known when every model is on this machine, or is a published one"
        placed = config.placement.of(group)
        total += placed.workers * (process.gpu_gib if placed.gpus else process.cpu_gib)
    return f"memory in all: {total:.1f} GiB, estimated from weights, gradients, moments and activations"


def _threads(config: Config) -> str:
    return f"{config.placement.threads} torch thread" + ("" if config.placement.threads == 1 else "s")


def _schedule(config: Config) -> list[str]:
    preference, steps = config.preference, config.steps
    timesteps = ", ".join(map(str, config.sampling.timesteps))
    stepping = range(preference.start_step, steps, preference.every) if preference.updates else range(0)
    critics = steps * config.ttur if preference.distill else 0
    lines = [f"{steps:,} steps, batch {config.batch}, denoising timesteps {timesteps}"]
    if preference.distill:
        lines.append(
            f"each step: 1 generator update, {config.ttur} score-estimator and {config.ttur} discriminator updates (TTUR {config.ttur})"
        )
    if preference.updates:
        beside = "each step" if preference.every == 1 else f"every {preference.every} steps"
        at = ", ".join(str(t) for t in config.sampling.timesteps[: config.high_noise_steps])
        lines.append(
            f"{beside} from step {preference.start_step}: {preference.updates} preference updates of {preference.batch} prompts x "
            f"{preference.candidates} candidates at timestep {at}"
        )
    generator = steps if preference.distill else 0
    lines.append(
        f"in all: {generator:,} generator, {critics:,} score-estimator, {critics:,} discriminator, "
        f"{len(stepping) * preference.updates:,} preference updates; {generator * config.batch:,} distillation samples"
    )
    lines += _rates(config, generator, critics, len(stepping) * preference.updates)
    lines.append(
        f"every {config.checkpoint.every} steps a checkpoint, every {config.tracking.samples_every} a sample sheet"
    )
    return lines


def _rates(config: Config, generator: int, critics: int, preferences: int) -> list[str]:
    """One line for each learning rate that falls: whether it is down before its updates are over is plain to see."""
    heads = critics if config.adversarial.space == "pixel" else 0  # DMD2's head is part of the score estimator
    trained = (
        ("generator", config.generator, generator),
        ("score-estimator", config.score, critics),
        ("discriminator", config.adversarial.optimizer, heads),
        ("preference", config.preference, preferences),
    )
    return [
        f"{name} rate: from {rate.lr:g} down to {rate.floor * rate.lr:g} at update {rate.decay:,} of {updates:,}"
        for name, rate, updates in trained
        if updates and rate.decay is not None
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; columns of numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [
        all(row[i].replace(",", "").replace(".", "").isdigit() for row in rows if row[i] not in ("small", UNKNOWN))
        for i in range(len(head))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
