"""The text of `--dry-run`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flashdmd_ray.config import Config, GroupConfig
from flashdmd_ray.data.datasets import describe_data
from flashdmd_ray.plan.fit import GIB, Process, check_fit, processes, room_of
from flashdmd_ray.plan.forecast import IDLE, better_placement, critical_path, forecast_of
from flashdmd_ray.plan.hardware import Gpu
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import Models, models_of
from flashdmd_ray.plan.parts import Part
from flashdmd_ray.plan.works import Step
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.storage import checkpoint_root, children

UNKNOWN = "on loading"


def describe(config: Config, run: RunDirectory, parts: Sequence[Part], gpu: Gpu | None = None) -> str:
    """The text of `--dry-run` in one piece; see `sections`."""
    return "\n\n".join(sections(config, run, parts, gpu))


def sections(config: Config, run: RunDirectory, parts: Sequence[Part], gpu: Gpu | None = None) -> Iterator[str]:
    """Roles, parameters, memory, operations and time, placement, data and the update schedule, each as soon as it is known.

    gpu: whose times are predicted. Raises ValueError, one line, when a process needs more than its GPU has.
    """
    state = "resumes from its newest checkpoint" if children(checkpoint_root(config, run.path)) else "new"
    yield _section("run", [f"{run.path} ({state}), runtime {config.runtime}, seed {config.seed}"])
    head = ["role", "worker group", "parameters", "trained", "from"]
    yield _section("roles", table(head, [_row(part) for part in parts]))
    models = models_of(config)
    yield _section("data", describe_data(config.data))
    yield _section("schedule", _schedule(config))
    step = step_of(config, models, gpu)
    check_fit(config, models, parts, step)
    yield _section("memory and operations of one rank", _costs(parts, step))
    yield _section("placement", _placement(config, parts, step))
    if gpu is not None and step is not None:
        yield _section("time", _times(config, models, step, gpu))


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _times(config: Config, models: Models, step: Step, gpu: Gpu) -> list[str]:
    """Seconds of each call, what a step waits for, and one line that says it all."""
    forecast = forecast_of(config, step, gpu)
    if forecast is None or step.timing is None:
        return ["no GPU is asked for: nothing is predicted"]
    shares = step.timing.busy
    rows = [
        [each.group, each.call, f"{each.calls:.3g}", f"{each.seconds:.3g}"]
        for each in sorted(step.timing.times, key=lambda each: -each.seconds)
    ]
    lines = table(["worker group", "call", "calls per step", "seconds per step"], rows)
    lines.append("share of a step at work: " + ", ".join(f"{group} {share:.0%}" for group, share in shares.items()))
    if step.published:
        lines.append(f"published to the rollouts: {step.published / GIB:.3g} GiB a version")
    lines += [critical_path(step), forecast.line()]
    if forecast.idle > IDLE:
        better = better_placement(config, models, step, forecast)
        lines.append(
            f"GPUs wait for {forecast.idle:.0%} of the time; {better or 'no other division of them is better'}"
        )
    return lines


def _row(part: Part) -> list[str]:
    small = part.parameters == 0 and part.trained == "yes"  # a head; a server's model has none here
    count = UNKNOWN if part.parameters is None else "small" if small else f"{part.parameters:,}"
    return [part.name, part.group, count, part.trained, part.source]


def _costs(parts: Sequence[Part], step: Step | None) -> list[str]:
    """One row for each part: what it keeps, what it needs while it works, and the operations of a mean step."""
    head = ["role", "worker group", "weights", "gradients", "optimizer", "activations", "TFLOP per step"]
    if step is None:
        return ["known when every model is on this machine, or is a published one"]
    done = {(work.group, work.part): work for work in step.works}
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
    total = sum(work.flops for work in step.works)
    return [*lines, f"operations of one rank of each group together: {total / 1e12:,.3g} TFLOP per step"]


def _mib(size: float) -> str:
    mib = size / 2**20
    return "0" if not size else f"{mib:,.1f}" if mib < 100 else f"{mib:,.0f}"


def _placement(config: Config, parts: Sequence[Part], step: Step | None) -> list[str]:
    """One row for each kind of process."""
    planned = processes(config, parts, step)
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
        f"every {config.checkpoint.every} steps a checkpoint, every {config.tracking.samples_every} a sample grid"
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
