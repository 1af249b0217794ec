"""The networks of each worker group and the bytes that one rank keeps of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.plan import specs
from flashdmd_ray.plan.costs import Cost, cost_of, known_cost
from flashdmd_ray.plan.models import Model, Models, models_of

FLOAT = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 2 * 4.0, "adamw_8bit": 2 * (1 + 4 / 256)}
"""Bytes of AdamW's two moments for each parameter and objective."""
BUCKET = 500_000_000
"""Elements that DeepSpeed sends at a time, its default."""
LIVE = 1_000_000_000
"""Elements that ZeRO stage 3 keeps gathered at most, its default."""


@dataclass(frozen=True)
class Held:
    """Bytes on one rank. optimizer: masters where they are apart from the weights, moments, averages. host: what is in host memory."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Part:
    """One network in one worker group. parameters: None when only loading can tell, 0 for a small head. held: None when unknown."""

    name: str
    group: str
    parameters: int | None
    trained: str
    held: Held | None
    source: str


def parts_of(config: Config) -> list[Part]:
    """The networks of each worker group, in the order in which they are built. Raises ValueError for missing or damaged model files."""
    return parts_of_models(config, models_of(config))


def parts_of_models(config: Config, models: Models) -> list[Part]:
    """As `parts_of`, of models that are known."""
    frozen = BYTES[config.model.dtype]
    parts = [
        _frozen("teacher", "learner", models.denoiser.parameters, frozen, models.denoiser.source),
        _trained(config, models, "generator"),
        _trained(config, models, "score"),
    ]
    if config.preference.updates:
        parts.append(_reference(config, models))
    parts += _family(models, "learner", frozen)
    if models.sam is None:
        parts.append(Part("discriminator head", "learner", 0, "yes", Held(), "on the score estimator's mid block"))
    else:
        parts += _discriminator(models, known_cost(specs.judge(config, models)), frozen)
        if config.adversarial.prompt_projection:
            parts.append(_texts(models, "discriminator", frozen))
        parts.append(_frozen("VAE", "discriminator", models.vae.parameters, frozen, models.vae.source))
    if config.preference.updates:
        parts += _rollout(config, models)
        for pool, rewards in config.reward_pools.items():
            parts += _reward_pool(config, models, pool, rewards)
    return parts


def _reward_pool(config: Config, models: Models, pool: str, rewards: Sequence[RewardConfig]) -> list[Part]:
    """Its models, and the text encoders for those that read their embeddings."""
    parts = []
    for reward in rewards:
        model = models.rewards[reward.label]
        # A latent reward may share weights with a U-Net beside it: its own file does not hold them all.
        cost = known_cost(specs.latent_reward(config, models, reward.label))
        count = cost.parameters if cost and teacher_parts(reward, model) else model.parameters
        parts.append(_frozen(f"reward: {reward.label}", pool, count, BYTES[reward.dtype], model.source))
    size = BYTES[config.model.dtype]
    held = {part for reward in rewards for part in teacher_parts(reward, models.rewards[reward.label])}
    if "denoiser" in held:
        parts.append(_frozen("teacher", pool, models.denoiser.parameters, size, models.denoiser.source))
    if "text" in held:
        parts.append(_texts(models, pool, size))
    return parts


def teacher_parts(reward: RewardConfig, model: Model) -> tuple[str, ...]:
    """Parts of the teacher's family that a reward's workers hold: those of LPO bring text encoders of their own."""
    if reward.reads_images or (model.config or {}).get("lpo"):
        return ()
    return ("denoiser", "text") if reward.entry.reads_estimates else ("text",)


def _frozen(name: str, group: str, parameters: int | None, size: float, source: str) -> Part:
    held = None if parameters is None else Held(weights=size * parameters)
    return Part(name, group, parameters, "no", held, source)


def _family(models: Models, group: str, size: float) -> list[Part]:
    return [_texts(models, group, size), _frozen("VAE", group, models.vae.parameters, size, models.vae.source)]


def _texts(models: Models, group: str, size: float) -> Part:
    return _frozen("text encoders", group, models.text_parameters, size, models.texts[0].source)


def _discriminator(models: Models, cost: Cost | None, frozen: float) -> list[Part]:
    sam = models.sam
    assert sam is not None, "a pixel discriminator has a SAM"
    # Of a checkpoint only the image encoder is loaded, up to its last level; without a cost all of it is counted, and the small heads not.
    encoder = _frozen(
        "discriminator: SAM", "discriminator", cost.parameters if cost else sam.parameters, frozen, sam.source
    )
    count = cost.trained if cost else 0
    heads = Held(FLOAT * count, FLOAT * count, MOMENTS["adamw"] * count)
    return [
        replace(encoder, parameters=sam.parameters),
        Part("discriminator: heads", "discriminator", count, "yes", heads, "scratch"),
    ]


def trained_parameters(config: Config, models: Models, role: str) -> int | None:
    """Number of trained parameters: all of the network, or the adapter's."""
    if role not in config.lora.networks:
        return models.denoiser.parameters
    cost = cost_of(specs.trained(config, models, role))
    return None if cost is None else cost.trained


def _trained(config: Config, models: Models, role: str) -> Part:
    name = "generator" if role == "generator" else "score estimator"
    adapter = role in config.lora.networks
    count = trained_parameters(config, models, role)
    objectives = 1 + bool(config.preference.updates and role == "generator")
    held = None if count is None else _training(config, count, objectives)
    if held is not None and role == "generator" and config.evaluation.ema:
        average = FLOAT * count / (config.placement.learner.workers if config.engine.kind == "deepspeed" else 1)  # type: ignore[operator]
        held = _with_optimizer(config, held, average)
    return Part(name, "learner", count, "adapter" if adapter else "yes", held, "the teacher")


def published_bytes(config: Config, models: Models) -> float:
    """Weights that go to the rollout workers before a step with preference updates, in the compute precision; none beside the learner."""
    travel = config.preference.updates and not config.beside_learner("rollout")
    count = trained_parameters(config, models, "generator") if travel else 0
    return BYTES[config.engine.precision] * float(count or 0)


def _training(config: Config, count: int, objectives: int) -> Held:
    """Memory an engine keeps for `count` trained parameters on one rank (flashdmd_ray/engine)."""
    engine, size = config.engine, BYTES[config.engine.precision]
    moments = MOMENTS[engine.optimizer] * objectives * count
    if engine.kind == "torch":
        apart = engine.offload_optimizer or engine.precision != "float32"
        held = Held(weights=(size if apart else FLOAT) * count, gradients=FLOAT * count)
        return _with_optimizer(config, held, moments + (FLOAT * count if apart else 0))
    share = 1 / config.placement.learner.workers
    bucket = size * min(count, BUCKET)
    if engine.zero_stage == 3:
        gathered = size * min(count, LIVE)
        held = Held(weights=size * count * share + gathered, gradients=FLOAT * count * share + bucket)
    elif engine.zero_stage == 2:
        held = Held(weights=size * count, gradients=FLOAT * count * share + bucket)
    else:
        held = Held(weights=size * count, gradients=size * count + FLOAT * count * share + bucket)
    return _with_optimizer(config, held, (FLOAT * count + moments) * share)


def _with_optimizer(config: Config, held: Held, size: float) -> Held:
    if config.engine.offload_optimizer:
        return replace(held, host=held.host + size)
    return replace(held, optimizer=held.optimizer + size)


def _reference(config: Config, models: Models) -> Part:
    """A frozen copy of what the generator's engine trains, whole on every rank and in the compute precision."""
    count = trained_parameters(config, models, "generator")
    source = f"the generator at step {config.preference.start_step}"
    part = _frozen("reference policy", "learner", count, BYTES[config.engine.precision], source)
    return replace(part, trained="no")


def _rollout(config: Config, models: Models) -> list[Part]:
    frozen = BYTES[config.model.dtype]
    if config.beside_learner("rollout"):
        return [Part("rollout", "rollout", 0, "no", Held(), "the generator's own network")]
    count = trained_parameters(config, models, "generator")
    return [
        _frozen("teacher", "rollout", models.denoiser.parameters, frozen, models.denoiser.source),
        _frozen("rollout", "rollout", count, BYTES[config.engine.precision], "the generator, before each step"),
        *_family(models, "rollout", frozen),
    ]
