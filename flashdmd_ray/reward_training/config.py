"""The configuration of a latent reward's training. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flashdmd_ray.config import (
    Count,
    EngineConfig,
    Fraction,
    LocalPath,
    MayChange,
    ModelConfig,
    OptimizerConfig,
    PathOrName,
    PositiveFloat,
    PositiveInt,
    RewardConfig,
    RunConfig,
    Section,
    Timestep,
)

DRAWN = ("teacher", "student")


class RewardModelConfig(Section):
    form: Literal["blocks", "clip"] = "blocks"
    """blocks: the teacher's own blocks, kind `latent`; they learn the labels of the pairs. clip: the tower of a pixel reward that reads
    latents, kind `latent_clip`; a stem learns to show it what it would see in the decoded image, so labels are only measured with."""
    width: Annotated[int, Field(strict=True, gt=0, multiple_of=8)] = 48
    """form 'clip' only: channels of the stem."""
    blocks: PositiveInt | None = None
    """SD3 only: how many of the transformer's blocks are kept; null is the first half."""
    train: Literal["all", "last"] = "all"
    """all: every kept weight. last: the mid block of a U-Net or the last kept block of a transformer, with the projections; what lies
    before stays the teacher's."""


class PairsConfig(Section):
    source: PathOrName = "demo"
    """Pairs of images: 'demo' composes digit scenes, right against contradicting or badly drawn ones; 'teacher' and 'student' draw two for
    each prompt; else a .parquet file or a folder of them, a folder of datasets.save_to_disk, or hf:owner/name[:split], with
    Pick-a-Pic's columns caption, jpg_0, jpg_1, label_0, label_1."""
    labels: Literal["given", "rewards"] = "given"
    """given: those of the source. rewards: the verdicts of `rewards` on the clean images, which then are written beside the run."""
    count: PositiveInt = 10_000
    """Pairs that 'demo', 'teacher' and 'student' make."""
    prompts: PathOrName | None = None
    """Prompts to draw for, each in turn: a .txt, .jsonl or .parquet file; null takes the demo's captions."""
    run: LocalPath | None = None
    """source 'student': the folder of the joint training run whose student draws."""
    drawing_steps: tuple[PositiveInt, ...] = (2, 4, 25)
    """source 'teacher': each image takes one of these numbers of DDIM steps, so that pairs differ in quality too."""
    guidance_scale: Annotated[float, Field(ge=1)] = 2.0
    """source 'teacher': classifier-free guidance of what is drawn; 1 is none."""
    held_out: Fraction = 0.1
    """Share of the prompts whose pairs are never trained on but measured with. ('demo' has held-out scenes of its own.)"""
    max_bad_fraction: Fraction = 0.01
    """Share of bad rows (no caption, no label, damaged image, ...) above which the job stops with a report. Bad ones are never used."""
    workers: MayChange[PositiveInt] = 2
    """Threads of each rank that decode ahead."""
    prefetch: MayChange[PositiveInt] = 2
    """Batches decoded ahead."""
    cache: MayChange[LocalPath | None] = None
    """Folder of the indexes of data sets; null is flashdmd_ray/data in the user's cache folder."""

    @property
    def is_made(self) -> bool:
        """True when the job makes the images itself."""
        return self.source in ("demo", *DRAWN)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.source in DRAWN and self.labels != "rewards":
            raise ValueError(f"labels: nobody has judged what the {self.source} draws; set it to 'rewards'")
        if (self.source == "student") != (self.run is not None):
            raise ValueError("run: goes with source 'student', and is the folder of that student's run")
        if self.prompts is not None and self.source not in DRAWN:
            raise ValueError("prompts: only source 'teacher' and 'student' draw for prompts; set it to null")
        return self


class RewardOptimizerConfig(OptimizerConfig):
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: as it is, or down to zero along a cosine."""

    @model_validator(mode="after")
    def _one_way_to_fall(self) -> Self:
        if self.decay is not None:
            raise ValueError("decay: the rate of this job falls by its schedule; set decay to null")
        return self


class WorkersConfig(Section):
    workers: PositiveInt = 1
    """Ranks that train together, each on its share of the batch."""
    cpus: PositiveFloat = 0.5
    """Ray CPUs each reserves; a reservation, not a limit."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each; 0 is the CPU."""


class RewardCheckpointConfig(Section):
    every: PositiveInt = 200
    """Steps between checkpoints; the last step, and a stop, always write one."""
    keep: PositiveInt = 2
    """The newest so many stay."""


class RewardDeadlineConfig(Section):
    start_s: PositiveFloat = 600.0
    """For the workers to come up and load their models."""
    collective_s: PositiveFloat = 600.0
    """For one exchange between the ranks."""
    attempts: PositiveInt = 3
    """Times training goes on from the last checkpoint after a worker was lost."""


class AccuracyConfig(Section):
    timesteps: tuple[Timestep, ...] = (249, 499, 749, 999)
    """Timesteps at which held-out pairs are judged."""
    pairs: PositiveInt = 2000
    """Held-out pairs, at most."""
    batch: PositiveInt = 32
    """Pairs judged at a time on each rank."""


class RewardTrainingConfig(Section):
    """Everything the training of a latent reward is told."""

    seed: Count = 0
    """Seed of everything random: the same configuration and seed give the same result."""
    steps: PositiveInt = 8000
    """Updates (LPO: 8,000). The number shapes the learning rate, so a resumed run has the same."""
    batch: PositiveInt = 32
    """Pairs per update, split over the ranks (LPO: 32)."""
    runtime: MayChange[Literal["local", "ray"]] = "ray"
    """local: one process, no Ray. ray: workers under Ray Train."""
    run: MayChange[RunConfig] = RunConfig(name="latent_reward")
    """The run's name and where its folder lies; the same name again resumes it."""
    model: ModelConfig = ModelConfig()
    """The teacher: its family, files, image size and number type."""
    latent_reward: RewardModelConfig = RewardModelConfig()
    """The latent reward's network, and what of it is trained."""
    pairs: PairsConfig = PairsConfig()
    """Labelled pairs of images, or how they are made."""
    rewards: tuple[RewardConfig, ...] = (RewardConfig(kind="pickscore"),)
    """Pixel rewards: those that are not held_out give the verdicts of pairs.labels 'rewards'; all are measured beside the latent reward, on
    the clean images."""
    timestep_range: tuple[Timestep, Timestep] = (0, 999)
    """[lowest, highest] timestep that pairs are noised to, one for both images; spread evenly over the batch."""
    noise: Literal["shared", "own"] = "shared"
    """Whether the two images of a pair get the same noise, or each its own. Both are measured at the end."""
    optimizer: RewardOptimizerConfig = RewardOptimizerConfig(lr=1e-5)
    """The reward's optimizer."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the weights, which then is the result; 0 is off."""
    engine: EngineConfig = EngineConfig()
    """The engine behind the optimizers, its precision and ZeRO stage."""
    workers: MayChange[WorkersConfig] = WorkersConfig()
    """Ranks that train together, and their CPUs and GPUs."""
    threads: MayChange[PositiveInt] = 1
    """torch threads of every process."""
    checkpoint: MayChange[RewardCheckpointConfig] = RewardCheckpointConfig()
    """When checkpoints are written, where to, and which stay."""
    deadlines: MayChange[RewardDeadlineConfig] = RewardDeadlineConfig()
    """Seconds that the job waits for its workers."""
    accuracy: AccuracyConfig = AccuracyConfig()
    """Accuracy on held-out pairs at the end."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch % self.workers.workers:
            raise ValueError(
                f"workers.workers: {self.workers.workers} ranks cannot share batch {self.batch} equally; choose a multiple of the ranks"
            )
        if self.batch // self.workers.workers < self.engine.micro_batches:
            raise ValueError(
                f"engine.accumulation: {self.batch // self.workers.workers} pairs on each rank cannot be cut into "
                f"{self.engine.micro_batches} micro-batches; set it to at most {self.batch // self.workers.workers}"
            )
        if self.runtime == "local" and self.workers.workers > 1:
            raise ValueError("workers.workers: more than one needs runtime 'ray'")
        if self.timestep_range[0] > self.timestep_range[1]:
            raise ValueError(f"timestep_range: the first must not be above the second, got {list(self.timestep_range)}")
        if self.latent_reward.blocks is not None and not self.model.entry.latent_reward_blocks:
            raise ValueError(
                f"latent_reward.blocks: family '{self.model.family}' has no transformer blocks; set it to null"
            )
        self._check_rewards()
        if self.latent_reward.form == "clip":
            self._check_judge()
        return self

    def _check_judge(self) -> None:
        judging = [reward.kind for reward in self.rewards if not reward.held_out]
        if len(judging) != 1 or judging[0] not in ("pickscore", "clipscore"):
            raise ValueError(
                "rewards: latent_reward.form 'clip' takes the tower of one reward of kind pickscore or clipscore; hold the others out"
            )
        if self.latent_reward.train == "last" or self.latent_reward.blocks is not None:
            raise ValueError(
                "latent_reward: train and blocks choose among the teacher's blocks; leave them out for form 'clip'"
            )

    def _check_rewards(self) -> None:
        labels = [reward.label for reward in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: two rewards are called the same ({', '.join(labels)}); give each a name")
        for index, reward in enumerate(self.rewards):
            if reward.entry.reads_latents:
                raise ValueError(
                    f"rewards.{index}.kind: '{reward.kind}' does not look at images; only pixel rewards can judge here"
                )
            if reward.pool is not None:
                raise ValueError(f"rewards.{index}.pool: there are no pools here, every rank judges; leave it null")
        if self.pairs.labels == "rewards" and all(reward.held_out for reward in self.rewards):
            raise ValueError("rewards: pairs.labels 'rewards' needs one that is not held_out")
