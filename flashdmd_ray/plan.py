"""What a configuration would do, in words and numbers, without loading a model: `--dry-run`. Imports no torch and no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashdmd_ray.config import Config, GroupConfig
from flashdmd_ray.data.catalogue import describe_data, named
from flashdmd_ray.model_files import DENOISER, VAE, ModelFiles, reward_files, sam_files, teacher_files
from flashdmd_ray.run_directory import RunDirectory
from flashdmd_ray.storage import check_checkpoint_root, checkpoint_root, children

GIB = 2**30
FLOAT = 4
PROCESS_GIB = 0.6
"""Private memory of one worker before its models, a rough estimate: Python, torch, diffusers, transformers and Ray."""


@dataclass(frozen=True)
class Part:
    """One network in one worker group. parameters: None when only loading can tell. bytes_each: kept per parameter."""

    name: str
    group: str
    parameters: int | None
    trained: str
    bytes_each: float
    source: str


def check(config: Config) -> tuple[RunDirectory, list[Part]]:
    """Everything that can be known to be wrong before work begins: run folder, model files. Creates nothing.

    Raises ValueError, one line, naming the key or file and the remedy.
    """
    for group, placed in config.placement:
        if isinstance(placed, GroupConfig) and placed.gpus:
            raise ValueError(f"placement.{group}.gpus: this version trains on CPUs, GPU workers follow; set it to 0")
    run = RunDirectory.check(config.run.dir, config.run.name, config.model_dump(mode="json"))
    check_checkpoint_root(config, run.path)
    named(config.data)
    return run, parts_of(config)


def describe(config: Config, run: RunDirectory, parts: Sequence[Part]) -> str:
    """The text of `--dry-run`: roles, parameters, placement, memory and the update schedule."""
    state = "resumes from its newest checkpoint" if children(checkpoint_root(config, run.path)) else "new"
    sections = [
        ("run", [f"{run.path} ({state}), runtime {config.runtime}, seed {config.seed}"]),
        ("roles", table(["role", "worker group", "parameters", "trained", "from"], [_row(part) for part in parts])),
        ("placement", _placement(config, parts)),
        ("data", describe_data(config.data)),
        ("schedule", _schedule(config)),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in sections)


def parts_of(config: Config) -> list[Part]:
    """The networks of each worker group, in the order in which they are built. Raises ValueError for missing or damaged model files."""
    teacher, rewards = teacher_files(config), reward_files(config)
    latent_adversary = config.adversarial.space == "latent"
    preference = bool(config.preference.updates)
    denoiser, vae = teacher.parameters.get(DENOISER), teacher.parameters.get(VAE)
    frozen = FLOAT // 2 if config.model.dtype == "bfloat16" else FLOAT
    encoders = [count for part, count in teacher.parameters.items() if part.startswith("text_encoder")]
    texts = sum(encoders) if encoders else None

    def family(group: str) -> list[Part]:
        return [
            Part("text encoders", group, texts, "no", frozen, teacher.source),
            Part("VAE", group, vae, "no", frozen, teacher.source),
        ]

    ranks = config.placement.learner.workers
    parts = [
        Part("teacher", "learner", denoiser, "no", frozen, teacher.source),
        Part("generator", "learner", denoiser, "yes", _training_bytes(config, 1 + preference, ranks), "the teacher"),
        Part("score estimator", "learner", denoiser, "yes", _training_bytes(config, 1, ranks), "the teacher"),
    ]
    if preference:
        parts.append(
            Part(
                "reference policy",
                "learner",
                denoiser,
                "no",
                FLOAT,
                f"the generator at step {config.preference.start_step}",
            )
        )
    parts += family("learner")
    if latent_adversary:
        parts.append(Part("discriminator head", "learner", 0, "yes", 0, "on the score estimator's mid block"))
    else:
        sam = sam_files(config)
        parts.append(Part("discriminator: SAM", "discriminator", sam.total, "no", FLOAT, sam.source))
        parts.append(Part("discriminator: heads", "discriminator", 0, "yes", 0, "scratch"))
        parts += family("discriminator")
    if preference:
        parts += [
            Part("rollout", "rollout", denoiser, "no", FLOAT, "the generator, before each step"),
            *family("rollout"),
        ]
        parts += [_reward(label, files) for label, files in rewards.items()]
        parts += family("reward")
    return parts


def _reward(label: str, files: ModelFiles) -> Part:
    return Part(f"reward: {label}", "reward", files.total, "no", FLOAT, files.source)


def _training_bytes(config: Config, objectives: int, ranks: int) -> float:
    """Bytes per parameter and rank: weights and gradient, then two AdamW moments for each objective, and masters if they are kept apart."""
    if config.engine.kind == "torch":
        return FLOAT * (2 + 2 * objectives)
    return FLOAT * (2 + (1 + 2 * objectives) / ranks)


def _row(part: Part) -> list[str]:
    count = "on loading" if part.parameters is None else "small" if part.parameters == 0 else f"{part.parameters:,}"
    return [part.name, part.group, count, part.trained, part.source]


def _placement(config: Config, parts: Sequence[Part]) -> list[str]:
    """One row for each kind of process."""
    groups = list(dict.fromkeys(part.group for part in parts))
    if config.runtime == "local":
        memory = _memory(parts)
        return [f"one process for all roles, {_threads(config)}", *_memory_in_all([memory])]
    rows, memories = [], []
    for name in groups:
        placed: GroupConfig = getattr(config.placement, name)
        memory = _memory([part for part in parts if part.group == name])
        memories += placed.workers * [memory]
        rows.append(
            [
                name,
                str(placed.workers),
                f"{placed.cpus:g}",
                f"{placed.gpus:g}",
                "on loading" if memory is None else f"{memory:.1f} GiB",
            ]
        )
    head = ["worker group", "workers", "CPUs each", "GPUs each", "memory each"]
    return [*table(head, rows), f"{_threads(config)} in every process", *_memory_in_all(memories)]


def _threads(config: Config) -> str:
    return f"{config.placement.threads} torch thread" + ("" if config.placement.threads == 1 else "s")


def _memory(parts: Sequence[Part]) -> float | None:
    """GiB of one process; None when a part's size is not known. What several roles of a process share is loaded once."""
    distinct = {part.name: part for part in parts}.values()
    sizes = [None if part.parameters is None else part.bytes_each * part.parameters for part in distinct]
    return None if None in sizes else sum(size for size in sizes if size is not None) / GIB + PROCESS_GIB


def _memory_in_all(memories: Sequence[float | None]) -> list[str]:
    if None in memories:
        return ["memory in all: known when every model is on this machine"]
    total = sum(memory for memory in memories if memory is not None)
    return [f"memory in all: {total:.1f} GiB, estimated from weights, gradients and moments; activations come on top"]


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
    lines.append(
        f"every {config.checkpoint.every} steps a checkpoint, every {config.tracking.samples_every} a sample sheet"
    )
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; columns of numbers to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = [
        all(row[i].replace(",", "").replace(".", "").isdigit() for row in rows if row[i] not in ("small", "on loading"))
        for i in range(len(head))
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]
