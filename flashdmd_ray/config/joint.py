"""The configuration of a joint training run: all sections, and what must agree between them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from flashdmd_ray.config.algorithm import (
    AdversarialConfig,
    MatchingConfig,
    PreferenceConfig,
    SamplingConfig,
    ScoreConfig,
)
from flashdmd_ray.config.data import DataConfig
from flashdmd_ray.config.evaluation import EvaluationConfig
from flashdmd_ray.config.monitor import MonitorConfig
from flashdmd_ray.config.networks import LoraConfig, ModelConfig
from flashdmd_ray.config.optimizers import EngineConfig, OptimizerConfig
from flashdmd_ray.config.rewards import RewardConfig
from flashdmd_ray.config.run import CheckpointConfig, RunConfig, TrackingConfig
from flashdmd_ray.config.runtime import ControlConfig, DeadlineConfig, GroupConfig, PlacementConfig, PoolConfig
from flashdmd_ray.config.section import Count, PositiveInt, Section, suggestion

_GROUPS = ("learner", "discriminator", "rollout")
"""Worker groups that are not reward pools."""


class Config(Section):
    """Everything a joint training run is told."""

    seed: Count = 0
    steps: PositiveInt = 200
    """Passes of the loop: one generator update each, with its score, discriminator and preference updates."""
    batch: PositiveInt = 32
    """Global batch of the distillation step, split over the learner's ranks."""
    ttur: PositiveInt = 1
    """Score-estimator and discriminator updates per generator update: 1 or 2 here, 5 in DMD2."""
    runtime: Literal["local", "ray"] = "ray"
    """local: one process, no Ray. ray: learner, discriminator, rollout and reward workers."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    generator: OptimizerConfig = OptimizerConfig()
    score: ScoreConfig = ScoreConfig()
    matching: MatchingConfig = MatchingConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    preference: PreferenceConfig = PreferenceConfig()
    rewards: tuple[RewardConfig, ...] = (
        RewardConfig(kind="pickscore", pool="reward"),
        RewardConfig(kind="latent", pool="reward"),
    )
    monitor: MonitorConfig = MonitorConfig()
    engine: EngineConfig = EngineConfig()
    lora: LoraConfig = LoraConfig()
    placement: PlacementConfig = PlacementConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    control: ControlConfig = ControlConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_ranks()
        self._check_networks()
        self._check_family()
        self._check_pools()
        for name in ("matching", "score"):
            low, high = getattr(self, name).timestep_range
            if low >= high:
                raise ValueError(f"{name}.timestep_range: the first must be below the second, got [{low}, {high}]")
        if self.data.latents is not None and not (
            self.adversarial.space == "latent" or self.adversarial.real_through_vae
        ):
            raise ValueError(
                "data.latents: no real image passes through the VAE's encoder unless adversarial.space is 'latent' or "
                "adversarial.real_through_vae is true; set it to null"
            )
        if self.preference.updates:
            self._check_preference()
        elif not self.preference.distill:
            raise ValueError("preference.distill: false with preference.updates 0 leaves nothing to train")
        for steps in self.evaluation.student_steps or ():
            if len(self.sampling.timesteps) % steps:
                raise ValueError(
                    f"evaluation.student_steps: {steps} does not divide the {len(self.sampling.timesteps)} "
                    "sampling.timesteps; choose divisors"
                )
        return self

    def _check_ranks(self) -> None:
        for group, key, batch in (
            ("learner", "batch", self.batch),
            ("discriminator", "batch", self.batch),
            ("learner", "preference.batch", self.preference.batch),
        ):
            workers = getattr(self.placement, group).workers
            if batch % workers:
                raise ValueError(
                    f"placement.{group}.workers: {workers} ranks cannot share {key} {batch} equally; choose a multiple of the ranks"
                )
            if batch // workers < self.engine.accumulation:
                raise ValueError(
                    f"engine.accumulation: the {batch // workers} samples of {key} on each of {workers} ranks of the {group} cannot be cut "
                    f"into {self.engine.accumulation} micro-batches; set it to at most {batch // workers}"
                )
        if self.runtime == "local" and any(_most_workers(placed) > 1 for placed in self.placement.groups()):
            raise ValueError("placement: more than one worker needs runtime 'ray'")
        if self.runtime == "local" and self.data.decode == "ray":
            raise ValueError("data.decode: 'ray' needs runtime 'ray'; use 'threads'")

    def _check_pools(self) -> None:
        labels = [reward.label for reward in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: two rewards are called the same ({', '.join(labels)}); give each a name")
        for name in self.reward_pools:
            if name in _GROUPS:
                raise ValueError(
                    f"rewards: a pool cannot be called '{name}', as other workers are; give it another name"
                )
        for name in self.placement.pools:
            if name not in self.reward_pools:
                raise ValueError(
                    f"placement.pools.{name}: no reward is in that pool{suggestion(name, list(self.reward_pools))}; "
                    f"there are {', '.join(self.reward_pools)}"
                )

    def _check_networks(self) -> None:
        if self.adversarial.space == "latent" and self.score.ema < 1:
            raise ValueError(
                "score.ema: with adversarial.space 'latent' the score estimator carries a GAN head that the generator lacks, "
                "so it cannot be coupled; set score.ema to 1"
            )
        sharded = self.engine.kind == "deepspeed" and self.engine.zero_stage == 3
        if self.adversarial.space == "latent" and (sharded or self.engine.compile):
            raise ValueError(
                "adversarial.space: 'latent' stops the network's forward at its mid block, which neither engine.zero_stage 3 nor "
                "engine.compile can follow; use zero_stage 1 or 2 and compile false"
            )
        if self.lora.networks and self.engine.precision == "bfloat16" and self.model.dtype == "float32":
            raise ValueError(
                "model.dtype: with lora.networks the trained networks compute in the type of their frozen base, so engine.precision "
                "'bfloat16' needs model.dtype 'bfloat16'; set both alike"
            )
        if len(self.lora.networks) == 1 and self.score.ema < 1:
            raise ValueError(
                f"score.ema: with lora.networks [{self.lora.networks[0]}] one of generator and score estimator is an adapter and the other "
                "a whole network, so they cannot be coupled; set score.ema to 1, or lora.networks to [generator, score]"
            )

    def _check_family(self) -> None:
        family = self.model.family
        if family == "sd15" and self.adversarial.space == "pixel" and self.adversarial.prompt_projection:
            raise ValueError(
                "adversarial.prompt_projection: model.family 'sd15' has no pooled prompt embedding; set it to false"
            )
        for index, reward in enumerate(self.rewards if self.preference.updates else ()):
            if reward.kind == "latent" and reward.path == "demo" and family != "sdxl":
                raise ValueError(
                    f"rewards.{index}.path: the packaged latent reward reads latents of the packaged model.family 'sdxl', not '{family}'; "
                    "name one that jobs/train_latent_reward.py made for it, or use kind 'pickscore'"
                )

    def _check_preference(self) -> None:
        next_steps = len(self.sampling.timesteps) - 1
        if not next_steps:
            raise ValueError(
                "preference.updates: candidates need a next timestep, a one-step generator has none; set it to 0"
            )
        if (self.preference.high_noise or 0) > next_steps:
            raise ValueError(
                f"preference.high_noise: candidates need a next timestep and {list(self.sampling.timesteps)} has {next_steps}; "
                f"set it to at most {next_steps}"
            )
        if all(reward.held_out for reward in self.rewards):
            raise ValueError(
                "rewards: preference updates need at least one reward that is not held out; add one or set preference.updates to 0"
            )

    @property
    def reward_pools(self) -> dict[str, tuple[RewardConfig, ...]]:
        """Pool -> the rewards in it, in the order of the configuration."""
        names = dict.fromkeys(reward.pool_name for reward in self.rewards)
        return {name: tuple(r for r in self.rewards if r.pool_name == name) for name in names}

    def placed(self, group: str) -> GroupConfig:
        """Where the workers of a group or pool are: 'learner', 'discriminator', 'rollout' or the name of a reward pool."""
        if group in _GROUPS:
            found: GroupConfig = getattr(self.placement, group)
            return found
        return self.placement.pools.get(group, self.placement.reward)

    def placement_key(self, group: str) -> str:
        """The setting that says so, for messages."""
        if group in _GROUPS:
            return f"placement.{group}"
        return f"placement.pools.{group}" if group in self.placement.pools else "placement.reward"

    def chunks(self, pool: str, groups: int) -> int:
        """Calls that so many prompt groups go to a pool of rewards in."""
        placed = self.placement.pools.get(pool, self.placement.reward)
        return -(-groups // (placed.groups_per_call or groups))

    def for_pool(self, name: str) -> Self:
        """The configuration as a worker of that reward pool sees it: with no other rewards than its own."""
        placement = self.placement.model_copy(update={"reward": self.placed(name), "pools": {}})
        return self.model_copy(update={"rewards": self.reward_pools[name], "placement": placement})

    @property
    def needs_images(self) -> bool:
        """Whether a reward looks at the candidates' images."""
        return any(reward.reads_images for reward in self.rewards)

    @property
    def optimised_rewards(self) -> list[str]:
        """Labels of the rewards that training raises."""
        return [reward.label for reward in self.rewards if not reward.held_out] if self.preference.updates else []

    @property
    def watched(self) -> bool:
        """Whether the hack monitor has something to look at."""
        return self.monitor.enabled and self.preference.updates > 0

    @property
    def high_noise_steps(self) -> int:
        """The first so many denoising timesteps have candidates."""
        return self.preference.high_noise or min(2, len(self.sampling.timesteps) - 1)

    @property
    def student_timesteps(self) -> dict[int, tuple[int, ...]]:
        """Number of steps -> the denoising timesteps of that few-step row."""
        timesteps = self.sampling.timesteps
        counts = self.evaluation.student_steps or [n for n in (1, 2, 4, 8) if len(timesteps) % n == 0]
        return {count: timesteps[:: len(timesteps) // count] for count in counts}

    @property
    def teacher_guidance(self) -> float:
        """Classifier-free guidance of the teacher where its pictures are shown or measured."""
        chosen = self.evaluation.guidance_scale
        return self.matching.guidance_scale if chosen is None else chosen


def _most_workers(placed: GroupConfig) -> int:
    grown = placed.max_workers if isinstance(placed, PoolConfig) else None
    return grown or placed.workers
