"""The configuration of a joint training run: all sections, and values that follow from several of them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from flashdmd_ray.config.algorithm import (
    AdversarialConfig,
    GeneratorConfig,
    MatchingConfig,
    PreferenceConfig,
    SamplingConfig,
    ScoreConfig,
)
from flashdmd_ray.config.checks import check_agreement
from flashdmd_ray.config.data import DataConfig
from flashdmd_ray.config.evaluation import EvaluationConfig
from flashdmd_ray.config.monitor import MonitorConfig
from flashdmd_ray.config.networks import LoraConfig, ModelConfig
from flashdmd_ray.config.optimizers import EngineConfig
from flashdmd_ray.config.rewards import RewardConfig
from flashdmd_ray.config.run import CheckpointConfig, ProfileConfig, RunConfig, TrackingConfig
from flashdmd_ray.config.runtime import ControlConfig, DeadlineConfig, PlacementConfig
from flashdmd_ray.config.section import Count, MayChange, PositiveInt, Section


class Config(Section):
    """Everything a joint training run is told."""

    seed: Count = 0
    """Seed of everything random: the same configuration and seed give the same result."""
    steps: MayChange[PositiveInt] = 200
    """Passes of the loop: one generator update each, with its score, discriminator and preference updates."""
    batch: PositiveInt = 32
    """Global batch of the distillation step, split over the learner's ranks."""
    ttur: PositiveInt = 1
    """Score-estimator and discriminator updates per generator update: 1 or 2 here, 5 in DMD2."""
    runtime: MayChange[Literal["local", "ray"]] = "ray"
    """local: one process, no Ray. ray: learner, discriminator, rollout and reward workers."""
    run: MayChange[RunConfig] = RunConfig()
    """The run's name and where its folder lies; the same name again resumes it."""
    model: ModelConfig = ModelConfig()
    """The teacher: its family, files, image size and number type."""
    data: DataConfig = DataConfig()
    """Real images and prompts to train on."""
    sampling: SamplingConfig = SamplingConfig()
    """The generator's denoising timesteps."""
    generator: GeneratorConfig = GeneratorConfig()
    """The generator's optimizer, for distillation."""
    score: ScoreConfig = ScoreConfig()
    """The score estimator, which follows the generator's images."""
    matching: MatchingConfig = MatchingConfig()
    """Distribution matching: the teacher's guidance and noise levels."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """The discriminator and its losses."""
    preference: PreferenceConfig = PreferenceConfig()
    """Preference RL beside distillation: candidates, pairs, updates."""
    rewards: tuple[RewardConfig, ...] = (
        RewardConfig(kind="pickscore", pool="reward"),
        RewardConfig(kind="latent", pool="reward", held_out=True),
    )
    """Rewards to raise, and held-out ones that only judge. The defaults are the demo's."""
    monitor: MonitorConfig = MonitorConfig()
    """The hack monitor: is a reward being hacked?"""
    engine: EngineConfig = EngineConfig()
    """The engine behind the optimizers, its precision and ZeRO stage."""
    lora: LoraConfig = LoraConfig()
    """Training as low-rank adapters instead of whole networks."""
    placement: MayChange[PlacementConfig] = PlacementConfig()
    """Workers, CPUs and GPUs of each role."""
    deadlines: MayChange[DeadlineConfig] = DeadlineConfig()
    """Seconds that the job waits for its workers."""
    control: MayChange[ControlConfig] = ControlConfig()
    """The address by which a running job is looked at and resized."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written, where to, and which stay."""
    tracking: MayChange[TrackingConfig] = TrackingConfig()
    """Metrics, sample grids and MLflow."""
    profile: MayChange[ProfileConfig] = ProfileConfig()
    """Traces of chosen steps."""
    evaluation: MayChange[EvaluationConfig] = EvaluationConfig()
    """The table and the grid at the end."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        check_agreement(self)
        return self

    @property
    def reward_pools(self) -> dict[str, tuple[RewardConfig, ...]]:
        """Pool -> the rewards in it, in the order of the configuration."""
        names = dict.fromkeys(reward.pool_name for reward in self.rewards)
        return {name: tuple(r for r in self.rewards if r.pool_name == name) for name in names}

    def for_pool(self, name: str) -> Self:
        """The configuration as a worker of that reward pool sees it: with no other rewards than its own."""
        placement = self.placement.model_copy(update={"reward": self.placement.pool(name), "pools": {}})
        return self.model_copy(update={"rewards": self.reward_pools[name], "placement": placement})

    def process(self, group: str) -> str:
        """The group in whose processes the roles of `group` live; "local" for the one process of runtime 'local'."""
        return "local" if self.runtime == "local" else self.placement.home(group)

    def beside_learner(self, group: str) -> bool:
        """Return True if the roles of `group` live in the learner's processes."""
        return self.process(group) == self.process("learner")

    @property
    def critic_micro_batches(self) -> int:
        """Micro-batches per update of the pixel discriminator; as many as the engine's where the plan has not chosen."""
        own = self.adversarial.accumulation
        return self.engine.micro_batches if own == "auto" else own

    def due_rewards(self, step: int) -> tuple[RewardConfig, ...]:
        """The rewards that score the candidates of `step`, a step with preference updates."""
        nth = (step - self.preference.start_step) // self.preference.every
        return tuple(reward for reward in self.rewards if nth % reward.every == 0)

    @property
    def optimised_rewards(self) -> list[str]:
        """Labels of the rewards that training raises."""
        return [reward.label for reward in self.rewards if not reward.held_out] if self.preference.updates else []

    @property
    def monitor_enabled(self) -> bool:
        """True when the hack monitor is on and has preference updates to judge."""
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
