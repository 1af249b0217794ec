"""Checks of settings that must agree between sections. Each raises ValueError with one line: the key, what is wrong, the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.config.runtime import GroupConfig, PoolConfig
from flashdmd_ray.config.section import suggestion

if TYPE_CHECKING:
    from flashdmd_ray.config.joint import Config


def check_agreement(config: Config) -> None:
    """Raise ValueError for the first pair of settings that do not go together."""
    check_ranks(config)
    check_networks(config)
    check_family(config)
    check_pools(config)
    check_timesteps(config)
    check_data(config)
    check_preference(config)


def check_ranks(config: Config) -> None:
    """Batches that the ranks of a group can share and cut into micro-batches; one worker of each kind without Ray."""
    engine = "engine.accumulation", config.engine.micro_batches
    critic = (
        engine
        if config.adversarial.accumulation == "auto"
        else ("adversarial.accumulation", config.critic_micro_batches)
    )
    for group, key, batch, (setting, accumulation) in (
        ("learner", "batch", config.batch, engine),
        ("discriminator", "batch", config.batch, critic),
        ("learner", "preference.batch", config.preference.batch, engine),
    ):
        workers = config.placement.of(group).workers
        if batch % workers:
            raise ValueError(
                f"placement.{group}.workers: {workers} ranks cannot share {key} {batch} equally; choose a multiple of the ranks"
            )
        if batch // workers < accumulation:
            raise ValueError(
                f"{setting}: the {batch // workers} samples of {key} on each of {workers} ranks of the {group} cannot be cut "
                f"into {accumulation} micro-batches; set it to at most {batch // workers}"
            )
    if config.runtime == "local" and any(_max_workers(group) > 1 for group in config.placement.groups()):
        raise ValueError("placement: more than one worker needs runtime 'ray'")


def _max_workers(group: GroupConfig) -> int:
    grown = group.max_workers if isinstance(group, PoolConfig) else None
    return grown or group.workers


def check_networks(config: Config) -> None:
    """Networks whose weights and numeric types can be averaged, sharded and adapted as asked."""
    if config.adversarial.space == "latent" and config.score.ema < 1:
        raise ValueError(
            "score.ema: with adversarial.space 'latent' the score estimator carries a GAN head that the generator lacks, "
            "so it cannot be coupled; set score.ema to 1"
        )
    if config.generator.start is not None and "generator" in config.lora.networks:
        raise ValueError(
            "generator.start: an adapter starts on the teacher's own weights; leave 'generator' out of lora.networks, or set start to null"
        )
    sharded = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3
    if config.adversarial.space == "latent" and (sharded or config.engine.compile):
        raise ValueError(
            "adversarial.space: 'latent' stops the network's forward at its mid block, which neither engine.zero_stage 3 nor "
            "engine.compile can follow; use zero_stage 1 or 2 and compile false"
        )
    if config.lora.networks and config.engine.precision == "bfloat16" and config.model.dtype == "float32":
        raise ValueError(
            "model.dtype: with lora.networks the trained networks compute in the type of their frozen base, so engine.precision "
            "'bfloat16' needs model.dtype 'bfloat16'; set both alike"
        )
    if len(config.lora.networks) == 1 and config.score.ema < 1:
        raise ValueError(
            f"score.ema: with lora.networks [{config.lora.networks[0]}] one of generator and score estimator is an adapter and the other "
            "a whole network, so they cannot be coupled; set score.ema to 1, or lora.networks to [generator, score]"
        )


def check_family(config: Config) -> None:
    """Parts that the model family has."""
    family, entry = config.model.family, config.model.entry
    projected = config.adversarial.space == "pixel" and config.adversarial.prompt_projection
    if projected and not entry.pooled_encoders:
        raise ValueError(
            f"adversarial.prompt_projection: model.family '{family}' has no pooled prompt embedding; set it to false"
        )
    for index, reward in enumerate(config.rewards if config.preference.updates else ()):
        if reward.kind == "latent" and reward.path == "demo" and entry.demo_latent_reward is None:
            packaged = ", ".join(f"'{name}'" for name, other in FAMILIES.items() if other.demo_latent_reward)
            raise ValueError(
                f"rewards.{index}.path: the packaged latent reward reads latents of the packaged model.family {packaged}, not '{family}'; "
                "name one that flashdmd reward train made for it, or use kind 'pickscore'"
            )


def check_pools(config: Config) -> None:
    """Rewards with labels of their own, in pools that exist."""
    labels = [reward.label for reward in config.rewards]
    if len(set(labels)) < len(labels):
        raise ValueError(f"rewards: two rewards are called the same ({', '.join(labels)}); give each a name")
    for index, reward in enumerate(config.rewards):
        if reward.every > 1 and not reward.held_out:
            raise ValueError(
                f"rewards.{index}.every: '{reward.label}' is optimised, so every update needs it; set it to 1, or held_out to true"
            )
    for name, pool in config.reward_pools.items():
        if name in config.placement.WORKER_GROUPS:
            raise ValueError(f"rewards: a pool cannot be called '{name}', as other workers are; give it another name")
        if len({reward.every for reward in pool}) > 1:
            raise ValueError(
                f"rewards: those of pool '{name}' are scored in one call; give them one `every`, or pools of their own"
            )
    for name in config.placement.pools:
        if name not in config.reward_pools:
            raise ValueError(
                f"placement.pools.{name}: no reward is in that pool{suggestion(name, list(config.reward_pools))}; "
                f"there are {', '.join(config.reward_pools)}"
            )


def check_timesteps(config: Config) -> None:
    """Ranges of timesteps, and few-step rows that divide the denoising timesteps."""
    for name in ("matching", "score"):
        low, high = getattr(config, name).timestep_range
        if low >= high:
            raise ValueError(f"{name}.timestep_range: the first must be below the second, got [{low}, {high}]")
    for steps in config.evaluation.student_steps or ():
        if len(config.sampling.timesteps) % steps:
            raise ValueError(
                f"evaluation.student_steps: {steps} does not divide the {len(config.sampling.timesteps)} "
                "sampling.timesteps; choose divisors"
            )


def check_data(config: Config) -> None:
    """Data settings that something reads."""
    if config.runtime == "local" and config.data.decode == "ray":
        raise ValueError("data.decode: 'ray' needs runtime 'ray'; use 'threads'")
    if config.data.latents is not None and not (
        config.adversarial.space == "latent" or config.adversarial.real_through_vae
    ):
        raise ValueError(
            "data.latents: no real image passes through the VAE's encoder unless adversarial.space is 'latent' or "
            "adversarial.real_through_vae is true; set it to null"
        )


def check_preference(config: Config) -> None:
    """Candidates, rewards and updates that preference training needs."""
    if not config.preference.updates:
        if not config.preference.distill:
            raise ValueError("preference.distill: false with preference.updates 0 leaves nothing to train")
        return
    next_steps = len(config.sampling.timesteps) - 1
    if not next_steps:
        raise ValueError(
            "preference.updates: candidates need a next timestep, a one-step generator has none; set it to 0"
        )
    if (config.preference.high_noise or 0) > next_steps:
        raise ValueError(
            f"preference.high_noise: candidates need a next timestep and {list(config.sampling.timesteps)} has {next_steps}; "
            f"set it to at most {next_steps}"
        )
    if all(reward.held_out for reward in config.rewards):
        raise ValueError(
            "rewards: preference updates need at least one reward that is not held out; add one or set preference.updates to 0"
        )
