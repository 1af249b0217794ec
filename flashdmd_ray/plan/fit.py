"""Does it fit? Device memory of each process against its GPU, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.parts import Held, Part, parts_of_models
from flashdmd_ray.plan.works import Step

GIB = 2**30
CONTEXT_GIB = 1.0
"""What CUDA, cuBLAS, cuDNN and NCCL keep for themselves in each process."""
FRAGMENTS = 0.08
"""Part of the sum that the allocator cannot hand out, because of how it is cut up."""
PROCESS_GIB = 0.6
"""Host memory of one worker before its models, a rough estimate: Python, torch, diffusers, transformers and Ray."""


@dataclass(frozen=True)
class Process:
    """One worker of a group, or the one process of runtime 'local'. held, activations: bytes on its device."""

    group: str
    held: float
    activations: float
    host: float

    @property
    def gpu_gib(self) -> float:
        """GPU memory that it needs, with what an allocator and CUDA add."""
        return (self.held + self.activations) * (1 + FRAGMENTS) / GIB + CONTEXT_GIB

    @property
    def cpu_gib(self) -> float:
        """The same on a CPU, where nothing has to be added but the process itself."""
        return (self.held + self.activations + self.host) / GIB + PROCESS_GIB


def processes(config: Config, parts: Sequence[Part], step: Step | None) -> dict[str, Process | None]:
    """One process of each group by its name; None where a size is unknown. Runtime 'local' has one, called "local"."""
    groups = dict.fromkeys(config.process(part.group) for part in parts)
    # What is shared is loaded once.
    held = {group: {part.name: part.held for part in parts if config.process(part.group) == group} for group in groups}
    return {group: _process(group, held[group], step) for group in groups}


def _process(group: str, mine: Mapping[str, Held | None], step: Step | None) -> Process | None:
    held = [each for each in mine.values() if each is not None]
    if step is None or len(held) < len(mine):
        return None
    return Process(group, sum(each.device for each in held), step.peaks[group], sum(each.host for each in held))


def check_fit(config: Config, models: Models, parts: Sequence[Part], step: Step | None = None) -> None:
    """Raises ValueError, one line, when a process needs more than its GPU has; it names the first settings with which it would fit.

    step: the configuration's, if it was planned before.
    """
    rooms = {group: room for group in _placed(config) if (room := room_of(config, group)) is not None}
    if not rooms:
        return
    for group, process in processes(config, parts, step or step_of(config, models, repeats=1)).items():
        room = min(rooms.values()) if group == "local" else rooms.get(group)
        if process is not None and room is not None and process.gpu_gib > room:
            raise ValueError(_too_large(config, models, group, process, room))


def fits(config: Config, models: Models, step: Step) -> bool:
    """Return True if every process fits its GPU; False too where that cannot be known."""
    for group, process in processes(config, parts_of_models(config, models), step).items():
        room = room_of(config, "learner" if group == "local" else group)
        if process is None or (room is not None and process.gpu_gib > room):
            return False
    return True


def _placed(config: Config) -> list[str]:
    pools = ("rollout", *config.reward_pools) if config.preference.updates else ()
    homes = dict.fromkeys(config.placement.home(name) for name in ("learner", "discriminator", *pools))
    return [name for name in homes if config.placement.of(name).gpus]


def room_of(config: Config, group: str) -> float | None:
    """GiB of GPU memory for a worker of the group: its share of a GPU, or all of it for the one process of runtime 'local'. None when it
    has no GPU, or one that nothing is known of."""
    placed = config.placement.of(group)
    if not placed.gpus:
        return None
    memory = placed.gpu_memory_gib or _detected_gib()
    share = 1.0 if config.runtime == "local" else min(1.0, placed.gpus)
    return None if memory is None else memory * share


def _detected_gib() -> float | None:
    """Memory of the smallest GPU of this machine, if the configuration asks for GPUs and there is one. Imports torch."""
    from flashdmd_ray.plan.measure.device import smallest_gpu

    found = smallest_gpu()
    return None if found is None else found / GIB


def _too_large(config: Config, models: Models, group: str, process: Process, room: float) -> str:
    key = "learner" if group == "local" else group
    where = "the process of runtime 'local'" if group == "local" else f"a worker of the {group}"
    need = f"{config.placement.key(key)}: {where} needs {process.gpu_gib:.1f} GiB of GPU memory and has {room:.1f} GiB"
    for changes, found in _remedies(config, models, group, process.gpu_gib):
        if found.gpu_gib <= room:
            settings = ", ".join(f"{name} {value}" for name, value in changes.items())
            return f"{need}; with {settings} it needs {found.gpu_gib:.1f} GiB"
    return f"{need}; no setting brings it below that: take more workers, a larger GPU or a smaller model.resolution"


Setting = tuple[str, Callable[[Config], Any]]
_SETTINGS: Mapping[str, Sequence[Setting]] = {
    "learner": (
        ("engine.gradient_checkpointing", lambda config: True),
        ("engine.accumulation", lambda config: _most_micro_batches(config)),
        ("engine.precision", lambda config: "bfloat16"),
        ("model.dtype", lambda config: "bfloat16"),
        ("engine.zero_stage", lambda config: _next_stage(config, 2)),
        ("engine.zero_stage", lambda config: _next_stage(config, 3)),
        ("engine.offload_optimizer", lambda config: config.engine.optimizer == "adamw"),
        ("lora.networks", lambda config: ["generator", "score"]),
    ),
    "discriminator": (
        ("engine.gradient_checkpointing", lambda config: True),
        ("adversarial.accumulation", lambda config: config.batch // config.placement.of("discriminator").workers),
        ("model.dtype", lambda config: "bfloat16"),
    ),
    "rollout": (
        ("engine.precision", lambda config: "bfloat16"),
        ("model.dtype", lambda config: "bfloat16"),
        ("preference.decode_batch", lambda config: 1),
        ("preference.batch", lambda config: _fewest_prompts(config)),
        ("preference.candidates", lambda config: 2),
        ("lora.networks", lambda config: ["generator", "score"]),
    ),
    "reward": (
        ("model.dtype", lambda config: "bfloat16"),
        ("preference.batch", lambda config: _fewest_prompts(config)),
        ("preference.candidates", lambda config: 2),
    ),
}
"""What is tried for each group ("reward": for every pool of rewards), in this order, one on top of the other."""


def _remedies(config: Config, models: Models, group: str, need: float) -> Iterator[tuple[dict[str, Any], Process]]:
    """Settings that differ from the configuration's, one more each time, and what the process needs with them."""
    changes: dict[str, Any] = {}
    names = [name for name in (*config.placement.WORKER_GROUPS, *config.reward_pools) if config.process(name) == group]
    kinds = dict.fromkeys(name if name in _SETTINGS else "reward" for name in names)
    last = need
    for key, choose in [setting for kind in kinds for setting in _SETTINGS[kind]]:
        value = choose(config)
        if value is None or value is False or value == _value(config, key):
            continue
        try:
            changed = parse_config(_with(config, changes | {key: value}))
        except ValueError:  # does not go with another setting
            continue
        process = processes(changed, parts_of_models(changed, models), step_of(changed, models, repeats=1))[group]
        if process is None or process.gpu_gib >= last:
            continue
        changes, last = changes | {key: value}, process.gpu_gib
        yield changes, process


def _most_micro_batches(config: Config) -> int:
    """Largest number of micro-batches that a rank's samples allow."""
    placement = config.placement
    shares = [config.batch // placement.learner.workers, config.batch // placement.of("discriminator").workers]
    if config.preference.updates:
        shares.append(config.preference.batch // placement.learner.workers)
    return min(shares)


def _next_stage(config: Config, stage: int) -> int | None:
    return stage if config.engine.kind == "deepspeed" and config.engine.zero_stage < stage else None


def _fewest_prompts(config: Config) -> int:
    """Fewest prompts with which each rank of the learner still fills its micro-batches."""
    return config.placement.learner.workers * config.engine.micro_batches


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return list(value) if isinstance(value, tuple) else value


def _with(config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        tree[section][name] = value
    return tree
