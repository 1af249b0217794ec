"""The whole configuration, one typed tree. Imports no torch: help, errors and `--dry-run` are instant.

A field marked [open] is a point that the Flash-DMD paper (arXiv 2511.20549) leaves unstated; its default and where it comes from are in
the docstring under it.
"""

from __future__ import annotations

import difflib
import itertools
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from flashdmd_ray import published

DEFAULT_CONFIG = Path(__file__).parents[1] / "jobs" / "configs" / "demo.yaml"

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Timestep = Annotated[int, Field(strict=True, ge=0, le=999)]

REWARD_KINDS = (*published.REWARD_KINDS, "latent", "remote", "custom")
DEMO_REWARDS = ("pickscore", "latent")
"""Kinds with weights in the package."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, protected_namespaces=()
    )


_Section = TypeVar("_Section", bound=Section)


def _plain_name(name: str) -> str:
    if not name or name in {".", ".."} or any(c in name for c in "/\\\0") or ".." in name:
        raise ValueError("must be a plain folder name without '/', '\\' or '..'")
    return name


class RunConfig(Section):
    name: Annotated[str, AfterValidator(_plain_name)] = "demo"
    """Folder of this run below `dir`; the same name again resumes it."""
    dir: Path = Path("runs")
    """Where run folders and the default MLflow database live."""


class ModelConfig(Section):
    family: Literal["sdxl", "sd15", "sd3"] = "sdxl"
    """Which adapter of flashdmd_ray/models drives the networks. sd15: Stable Diffusion 1.5 and 2.1; sd3: 3 and 3.5. See docs/models.md."""
    teacher: str = "demo"
    """'demo' for the weights in the package, a directory or hub id of a diffusers pipeline, or one .safetensors file in the original
    layout."""
    teacher_config: str | None = None
    """Directory or hub id of the pipeline whose configuration and tokenizers go with a single-file teacher; null lets diffusers infer
    a hub id from the file."""
    vae: str | None = None
    """Directory or hub id of another VAE, such as madebyollin/sdxl-vae-fp16-fix; null is the teacher's own."""
    t5: bool = False
    """SD3 only: load text_encoder_3, the T5. Without it the denoiser reads zeros in its place, as SD3 allows."""
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] of the images that are trained on and sampled, in pixels; null is the teacher's own size."""
    original_size: tuple[PositiveInt, PositiveInt] | None = None
    """SDXL only: [height, width] that micro-conditioning states as the size before cropping; null is `resolution`."""
    crop: tuple[Count, Count] | None = None
    """SDXL only: [top, left] of the crop that micro-conditioning states; null is [0, 0], no crop."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the frozen networks: teacher, VAE and text encoders. What is trained: see engine.precision."""
    sam: str = "demo"
    """'demo', a directory with config.json and model.safetensors, or an official sam_vit_*.pth file."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.family == "sd15" and self.teacher == "demo":
            raise ValueError(
                "teacher: the package has no demo weights of family 'sd15'; name a teacher, or use family sdxl or sd3"
            )
        if self.t5 and self.family != "sd3":
            raise ValueError(f"t5: family '{self.family}' has no T5; set it to false")
        if self.family != "sdxl" and (self.original_size or self.crop):
            raise ValueError(
                f"original_size and crop: family '{self.family}' has no micro-conditioning; leave them null"
            )
        if self.teacher_config is not None and not self.teacher.endswith(".safetensors"):
            raise ValueError("teacher_config: goes with a single .safetensors file as teacher; leave it null")
        return self


class DataConfig(Section):
    source: str = "demo"
    """Captioned real images: 'demo' composes digit scenes of the train split; else a .tar or .parquet file, a folder of them, an image
    folder with metadata.jsonl, a folder of datasets.save_to_disk, or hf:owner/name[:split]. See docs/data.md."""
    prompts: str | None = None
    """Prompts to train on: a .txt, .jsonl or .parquet file; null takes the captions of `source`."""
    scenes: PositiveInt = 20_000
    """How many distinct scenes the demo source holds."""
    caption: str | None = None
    """Column or JSON field of the caption; null is the first of caption, text, prompt that is there."""
    image: str | None = None
    """Column of the image, in tables; null is the first usual one (image, jpg, ...)."""
    mix: PositiveInt | None = None
    """Shuffle this many blocks (archives, row groups) at a time, so that reading stays within them. null mixes everything, in parquet
    8 row groups, whose rows cannot be read alone."""
    max_bad: Fraction = 0.01
    """Share of bad samples (damaged, no caption, too large, ...) above which a run stops with a report. Bad ones are never used."""
    decode: Literal["threads", "ray"] = "threads"
    """threads: the process that trains on real images decodes them, ahead of itself. ray: Ray Data does, on any CPU of the cluster;
    the same images in the same order. Needs runtime 'ray'."""
    workers: PositiveInt = 2
    """Threads, or Ray tasks at a time, that decode in advance, for each process that trains on real images."""
    ahead: PositiveInt = 2
    """Batches decoded in advance."""
    cache: Path | None = None
    """Folder of the indexes of data sets; null is flashdmd_ray/data in the user's cache folder."""
    embeddings: Path | None = None
    """Folder of text embeddings from jobs/prepare_data.py --embeddings; prompts that are not in it are encoded as usual."""
    latents: Path | None = None
    """Folder of latents of `source` from jobs/prepare_data.py --latents, for real images that pass through the VAE's encoder."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.source == "demo" and self.latents is not None:
            raise ValueError("latents: the demo source composes its images anew; set latents to null")
        return self


class SamplingConfig(Section):
    timesteps: tuple[Timestep, ...] = (999, 749, 499, 249)
    """Denoising timesteps of the generator, strictly descending; 1, 2, 4 or 8 of them are usual."""

    @field_validator("timesteps")
    @classmethod
    def _descending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(a <= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"must be a strictly descending list such as [999, 749, 499, 249], got {list(value)}")
        return value


class RateConfig(Section):
    """A learning rate over the updates of one objective; a TTUR of 2, or 5 preference updates beside a step, count as so many."""

    lr: PositiveFloat = 1e-4
    """AdamW learning rate, at its highest."""
    warmup: Count = 20
    """Updates of linear warm-up. x0 = (x - s eps)/a multiplies an error by 14.6 at t=999: without it 20 updates can destroy a student."""
    decay: PositiveInt | None = None
    """Updates until the rate, falling linearly from the end of the warm-up, is down to `floor` times `lr`, where it stays; null keeps it
    at `lr`. Counted in updates and not in shares of `steps`, so that a run can be made longer."""
    floor: Fraction = 0.0
    """What share of `lr` is left after `decay` updates. 0 stops this objective there."""

    @model_validator(mode="after")
    def _falls_after_it_rose(self) -> Self:
        if self.decay is None and self.floor:
            raise ValueError("floor: only a rate with decay comes down to it; set decay, or floor to 0")
        if self.decay is not None and self.decay <= self.warmup:
            raise ValueError(
                f"decay: the rate would be down after {self.decay} updates, while it still rises for {self.warmup}; set decay above "
                "warmup, or to null"
            )
        return self


class OptimizerConfig(RateConfig):
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""


class ScoreConfig(OptimizerConfig):
    lr: PositiveFloat = 5e-4
    """5-10 x the generator's at TTUR 1: at an equal rate the score estimator lags and the generator degrades."""
    ema: Fraction = 0.98
    """[open] l of the coupling psi <- l psi + (1-l) theta after every generator update; 0.98 is SenseFlow's, 1 switches it off."""
    timestep_range: tuple[Timestep, Timestep] = (0, 999)
    """Lowest and highest timestep of the denoising loss."""
    target: Literal["network", "x0"] = "network"
    """[open] Regress the network's own parameterisation (eps, v or velocity) or its x0."""


class MatchingConfig(Section):
    routing: Literal["timestep_aware", "shared"] = "timestep_aware"
    """timestep_aware: distribution matching at high noise, GAN at the last timestep (Flash-DMD).
    shared: both on one forward at any timestep (DMD2)."""
    timestep_range: tuple[Timestep, Timestep] = (20, 980)
    """[open] Where x is noised for the DM gradient; the range is DMD2's."""
    guidance_scale: Annotated[float, Field(ge=1)] = 8.0
    """Classifier-free guidance of the teacher: 8 for SDXL, 7 for SD3 in related work, 1 (none) for the demo."""
    epsilon: PositiveFloat = 1e-6
    """Keeps the per-sample normaliser mean|x - x_real| from zero."""


class AdversarialConfig(Section):
    space: Literal["pixel", "latent"] = "pixel"
    """pixel: heads on frozen SAM features of decoded images (Flash-DMD). latent: a head on the score estimator's mid block (DMD2)."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """[open] The paper's equations print log D while its text names the hinge loss."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """[open] lambda of L_DM + lambda L_adv. With `balance` set it multiplies the balanced gradient instead."""
    balance: Annotated[float, Field(gt=0)] | None = None
    """[open] Ratio of the adversarial to the DM gradient's norm (both in latent space) that lambda is set to reach at each update;
    null uses `weight` as it is."""
    real_through_vae: bool = False
    """Encode and decode real images first, so that the discriminator cannot tell fakes by the autoencoder's traces."""
    prompt_projection: bool = False
    """[open] Heads also see the pooled prompt embedding (projection discriminator)."""
    score_weight: Annotated[float, Field(ge=0)] = 1e-2
    """latent space only: weight of the GAN loss beside the denoising loss in the score estimator's update (DMD2)."""
    hidden: PositiveInt = 32
    """Channels of a discriminator head."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, betas=(0.0, 0.99))
    """The heads' optimizer."""


class PreferenceConfig(RateConfig):
    updates: Count = 5
    """Preference updates beside each distillation step; 5 is the paper's best of 1, 2, 5, 10. 0 distils only."""
    every: PositiveInt = 1
    """Do the updates beside every n-th distillation step (ratios below 1:1)."""
    start_step: Count = 0
    """First step with preference updates; the reference policy is frozen there."""
    distill: bool = True
    """false: preference updates alone. A control that shows reward hacking, not a way to train."""
    batch: PositiveInt = 8
    """Prompt groups per preference update."""
    candidates: Annotated[int, Field(strict=True, ge=2)] = 4
    """K hops from one noisy latent; the best and the worst make the pair."""
    high_noise: PositiveInt | None = None
    """How many of the first denoising timesteps candidates are drawn at; null is 2 ({999, 749}), or 1 of a two-step generator."""
    beta: PositiveFloat = 0.1
    """[open] Temperature of -logsigmoid(beta H). LPO's 500 belongs to low-noise hops; at high noise it must be retuned."""
    lr: PositiveFloat = 2e-5
    """Learning rate of preference updates, at its highest; they keep AdamW moments and a count of updates of their own."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.45
    """A pair is kept when the softmax over its group's rewards differs by more than this between best and worst (LPO: 0.45-0.6)."""
    temperature: PositiveFloat = 1.0
    """Divides the normalised rewards inside that softmax."""
    reward_timestep: Literal["current", "next"] = "current"
    """[open] Timestep given to a latent reward for a candidate: LPO scores x_{t-1} with the current t."""
    candidate_image: Literal["one_hop", "remaining_hops"] = "one_hop"
    """How a candidate becomes a clean image for pixel rewards: one generator forward, or all remaining hops."""
    max_unscored: PositiveInt = 10
    """The run ends when so many preference updates in a row had no group that all its rewards could score."""
    decode_batch: PositiveInt = 8
    """Candidates that a rollout worker decodes at a time: what bounds its memory for the VAE (1.9 GiB each at 1024 pixels)."""


class RemoteConfig(Section):
    timeout_s: PositiveFloat = 60.0
    """For one attempt: connecting, sending, waiting and reading the whole answer."""
    attempts: PositiveInt = 3
    """In all; half a second, one, two ... lie between them, or what the server asks for in Retry-After, at most 30."""
    encoding: Literal["json", "safetensors"] = "json"
    """json: base64 PNG, readable by anything. safetensors: raw bytes, larger and without the work of packing."""
    token_env: str | None = None
    """Environment variable of the workers whose value is sent as bearer token; null sends none."""


class RewardConfig(Section):
    kind: str
    """pickscore, hpsv2, hpsv2.1, imagereward, clipscore, aesthetic or mps: published models of images and prompts. latent: a latent reward
    model. remote: a server's. custom: a class of your own. See docs/rewards.md."""
    name: str = ""
    """What metrics call it; the kind when empty."""
    path: str = "demo"
    """'demo' (pickscore, latent), a directory, a hub id, a file, or owner/name/file on the hub; the server's URL (remote);
    package.module:Class (custom)."""
    base: str | None = None
    """Directory or hub id of what `path` leaves out: tokenizer and image processor, for aesthetic also CLIP's image tower, for a latent
    reward in LPO's layout the pipeline with its tokenizers. null is `path` itself where it is such a directory, else the repository that
    the published model was made with."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Weights and activations of the model; rewards are float32 in any. Half precision rounds away small differences between images."""
    batch: PositiveInt = 16
    """Images that the model looks at in one go, which bounds its memory."""
    weight: PositiveFloat = 1.0
    """Weight after normalisation within the prompt group."""
    held_out: bool = False
    """true: logged, never optimised. A judge that training does not know."""
    unordered: str | None = None
    """Why this reward may prefer a destroyed image to a clean one, such as 'measures brightness'; null: a run with it is refused then."""
    pool: str | None = None
    """Rewards that name the same pool share its workers and one call; null is a pool of its own, under the reward's label."""
    remote: RemoteConfig | None = None
    """How a server is asked; null is the defaults. Only for kind remote."""
    options: dict[str, Any] = {}
    """Keyword arguments that the class is built with. Only for kind custom."""

    @property
    def label(self) -> str:
        return self.name or self.kind

    @property
    def pool_name(self) -> str:
        """The pool whose workers hold this reward."""
        return self.pool or self.label

    @property
    def reads_images(self) -> bool:
        """Whether it judges decoded images; a latent reward reads the latent itself."""
        return self.kind != "latent"

    @property
    def base_path(self) -> str:
        """Where `base` is, resolved; empty for kinds that read none."""
        known = published.REWARD_KINDS.get(self.kind)
        if known is None or known.base is None:
            return ""
        if self.base is not None or self.path == known.path:
            return self.base or known.base
        is_file = Path(self.path).is_file()
        whole = (not known.files and not is_file) or (Path(self.path) / "tokenizer_config.json").is_file()
        return self.path if whole else known.base

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind.startswith("hpsv3"):
            raise ValueError(
                f"the reward '{kind}' is not built in: it is a 7B model that pins other packages; serve it and use kind remote, "
                "see docs/rewards.md"
            )
        if kind not in REWARD_KINDS:
            raise ValueError(
                f"unknown reward '{kind}'{suggestion(kind, REWARD_KINDS)}; known: {', '.join(REWARD_KINDS)}"
            )
        return kind

    @model_validator(mode="before")
    @classmethod
    def _remote_defaults(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and tree.get("kind") == "remote" and tree.get("remote") is None:
            return {**tree, "remote": {}}
        return tree

    @model_validator(mode="after")
    def _together(self) -> Self:
        self._check_path()
        if self.base is not None and not self.base_path and self.kind != "latent":
            raise ValueError(f"base: a reward of kind '{self.kind}' reads none; leave it null")
        if self.remote is not None and self.kind != "remote":
            raise ValueError("remote: goes with kind remote; leave it null")
        if self.options and self.kind != "custom":
            raise ValueError("options: go with kind custom; leave them out")
        return self

    def _check_path(self) -> None:
        if self.kind == "remote":
            _check_url(self.path)
        elif self.kind == "custom":
            if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.path):
                raise ValueError(f"path: kind custom needs package.module:Class, got '{self.path}'")
        elif (named := published.REWARD_FILES.get(Path(self.path).name, self.kind)) != self.kind:
            raise ValueError(
                f"path: that file holds a reward of kind '{named}', not '{self.kind}'; correct one of them"
            )
        elif self.path == "demo" and self.kind not in DEMO_REWARDS:
            raise ValueError(
                f"path: the package has no demo weights of kind '{self.kind}'; name them, such as {published.REWARD_KINDS[self.kind].path}"
            )


def _check_url(text: str) -> None:
    url = urllib.parse.urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"path: kind remote needs the server's http:// or https:// address, got '{text}'")
    if url.username or url.password:
        raise ValueError(
            "path: no user or password in an address; put a token into the variable that remote.token_env names"
        )


class EngineConfig(Section):
    kind: Literal["torch", "deepspeed"] = "torch"
    """What trains the generator and the score estimator: every rank alone with all of it, or sharded by DeepSpeed ZeRO."""
    zero_stage: Literal[1, 2, 3] = 1
    """deepspeed only. What ranks share out: 1 masters and moments, 2 gradients too, 3 weights too."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the trained networks. Masters and moments are float32 in either. (float16 would need loss scaling.)"""
    accumulation: PositiveInt = 1
    """Micro-batches per update, one after the other: less memory for activations, the same update."""
    gradient_checkpointing: bool = False
    """Compute activations of the denoisers, SAM and the VAE decoder again in the backward pass instead of keeping them."""
    offload_optimizer: bool = False
    """Masters, moments and the optimizer's step in host memory. Saves nothing on a machine without a GPU."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments of 8 bits in blocks of 256 with one scale each; kind 'torch' only, needs the extra 'low-memory'."""
    compile: bool = False
    """torch.compile of the trained networks; not with ZeRO stage 3, whose gathering it cannot follow."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.optimizer == "adamw_8bit" and (self.kind == "deepspeed" or self.offload_optimizer):
            raise ValueError(
                "optimizer 'adamw_8bit' keeps its moments on one device: set kind to 'torch' and offload_optimizer to false, or use 'adamw'"
            )
        if self.compile and self.kind == "deepspeed" and self.zero_stage == 3:
            raise ValueError(
                "compile cannot follow the gathering of ZeRO stage 3: set compile to false, or zero_stage to 1 or 2"
            )
        return self


class LoraConfig(Section):
    networks: tuple[Literal["generator", "score"], ...] = ()
    """Networks trained as low-rank adapters of the frozen teacher, instead of whole: [generator, score], one of them, or none.
    With both, teacher, generator, score estimator and reference policy share one base: the memory of one network."""
    rank: PositiveInt = 64
    """Rank of every adapted layer's update."""
    alpha: PositiveFloat | None = None
    """The update is alpha / rank times B A; null is the rank itself, so a factor of 1."""
    targets: tuple[str, ...] | None = None
    """Adapted layers by the end of their path, such as [to_q, to_k, ff.net.2]; null is the family's attention projections."""

    @field_validator("networks")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names a network twice, got {list(value)}")
        return value

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and not all([*value, value]):
            raise ValueError(
                f"must name at least one layer, and no empty name; null adapts the attention projections, got {list(value)}"
            )
        return value


class GroupConfig(Section):
    workers: PositiveInt = 1
    """Processes (ranks of a group, members of a pool)."""
    cpus: PositiveFloat = 0.5
    """Ray CPUs each worker reserves; a reservation, not a limit."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or a share of one, for each worker; its networks are on the first of them. 0: on the CPU."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one of these GPUs in GiB: a plan that needs more is refused before anything is loaded. A worker with a share of a GPU has
    that share of the memory. null: that of the GPUs of this machine, if it has any."""


class PoolConfig(GroupConfig):
    max_workers: PositiveInt | None = None
    """null: always `workers`. Else the pool grows up to so many while calls wait, and shrinks back to `workers` when they do not."""
    shrink_after_s: PositiveFloat = 60.0
    """How long a grown pool must have been larger than its calls need. Above the time of a step: between steps no call waits."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(
                f"max_workers: {self.max_workers} is below workers {self.workers}; raise it, or null for a fixed size"
            )
        return self


class RewardPoolConfig(PoolConfig):
    groups_per_call: PositiveInt | None = None
    """Prompt groups in one call of a worker; null: all of an update. Fewer let several workers share one update, and lose less with a call
    that fails. It is the cut, never the number of workers, that a result depends on in its last bits."""


class PlacementConfig(Section):
    learner: GroupConfig = GroupConfig()
    """Teacher, generator and score estimator; ZeRO shards over its ranks."""
    discriminator: GroupConfig = GroupConfig()
    """Decoder, SAM and heads."""
    rollout: PoolConfig = PoolConfig()
    """Candidate generation from the published weights."""
    reward: RewardPoolConfig = RewardPoolConfig()
    """Every pool of rewards that `pools` does not name."""
    pools: dict[str, RewardPoolConfig] = {}
    """Single pools of rewards by name; what is not said here is as in `reward`."""
    threads: PositiveInt = 1
    """torch threads of every process, local runtime included: sums depend on it, so it is part of the configuration."""

    @model_validator(mode="before")
    @classmethod
    def _pools_start_from_reward(cls, tree: Any) -> Any:
        """Each entry of `pools` completed from `reward`, so that a dumped configuration says all of it."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("pools"), Mapping):
            return tree
        common = tree.get("reward") or {}
        if isinstance(common, GroupConfig):
            common = common.model_dump(exclude_unset=True)
        pools = {
            name: {**common, **pool} if isinstance(pool, Mapping) and isinstance(common, Mapping) else pool
            for name, pool in tree["pools"].items()
        }
        return {**tree, "pools": pools}

    def groups(self) -> list[GroupConfig]:
        """Every section of it that places workers."""
        return [self.learner, self.discriminator, self.rollout, self.reward, *self.pools.values()]


class DeadlineConfig(Section):
    start_s: PositiveFloat = 300.0
    """For a worker to come up and load its models."""
    call_s: PositiveFloat = 600.0
    """For one call of a role."""
    reward_s: PositiveFloat = 120.0
    """For one call of a reward worker."""
    retries: Count = 3
    """Replays of a call whose pool worker died, hung or failed."""
    checkpoint_s: PositiveFloat = 1800.0
    """For a checkpoint to be written; the next one, a stop and the end of the run wait for it."""
    attempts: PositiveInt = 3
    """Times the job is built anew from the last checkpoint after a learner or discriminator worker was lost."""


class ControlConfig(Section):
    enabled: bool = True
    """Serve the pools of a job on Ray for jobs/scale.py, to look at and to resize (docs/operations.md)."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it still needs the token in control.json of the run folder, but nothing is encrypted."""
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = 0
    """0: any free one."""


class CheckpointConfig(Section):
    every: PositiveInt = 50
    """Steps between checkpoints; the last step always writes one."""
    dir: str | None = None
    """A folder or URL (s3://bucket/folder, gs://..., any that fsspec has a driver for) that gets a folder of the run's name;
    null keeps checkpoints in the run folder. All machines of a job must see it."""
    asynchronous: bool = True
    """true: training goes on while a checkpoint is written, from copies in host memory. false: training waits."""
    keep: PositiveInt = 2
    """The newest so many complete checkpoints stay; older ones are removed when a new one is complete."""
    best_metric: str | None = None
    """A metric such as matching/real_fake_gap: the checkpoint with the best mean of it over the steps since the one before stays too."""
    best_mode: Literal["min", "max"] = "min"
    """Whether small or large values of `best_metric` are good."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking server; null uses a sqlite file beside the runs."""
    experiment: str = "flashdmd_ray"
    enabled: bool = True
    """false writes only the run folder."""
    samples_every: PositiveInt = 50
    """Steps between sample grids."""
    log_every: PositiveInt = 1
    """Steps between metric records."""


class EvaluationConfig(Section):
    prompts: str | None = None
    """Prompts of sample sheets, grid and table: a .txt, .jsonl or .parquet file, from its first line on. null: held-out digit scenes for
    the demo source; for other data its own prompts in the order of a stream of its own, which are prompts of training."""
    samples: Count = 500
    """Samples per row of the final table, and real images they are compared with; from 2, or 0 for no table. Prompts are used again, with
    other noise, when there are fewer."""
    batch: PositiveInt = 8
    """Images drawn, decoded and judged at a time, on each learner rank and in the final report."""
    teacher_steps: PositiveInt = 25
    """DDIM steps of the teacher's row, two forwards each with guidance."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Classifier-free guidance of the teacher's row, on the scale of `matching.guidance_scale` (1 is none); null takes that value. A
    teacher's best pictures may need another one than its best lesson."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the generator's weights over the steps, which sample sheets, the table and exports then use; rollouts
    do not. The n-th step keeps min(ema, n / (n + 9)) of it, so that a short run averages too. 0 is off."""
    student_steps: tuple[PositiveInt, ...] | None = None
    """Few-step rows of the table: each divides the number of denoising timesteps and uses every so many of them.
    null: 1, 2, 4 and 8 where they do."""

    @field_validator("samples")
    @classmethod
    def _none_or_enough(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a distance between distributions needs at least 2 samples; 0 leaves the table out")
        return value


class MonitorLimits(Section):
    """How far a signal may move from its start before it counts as a sign; beyond twice as far it counts as two. null leaves it out. Where
    the defaults come from: docs/hack_monitor.md."""

    held_out_gap: PositiveFloat | None = 0.5
    """Rise of the optimised rewards minus that of the held-out ones, each in units of its spread over candidates at the start."""
    disagreement: PositiveFloat | None = 0.5
    """Rise of 1 minus the rank correlation of two rewards within a prompt group, mean over pairs of rewards (GARDO's sign)."""
    latent_correlation: PositiveFloat | None = 0.5
    """Fall of the rank correlation of a latent and another reward within a prompt group."""
    dark_share: PositiveFloat | None = 0.05
    """Rise of the share of dark pixels, luminance below 0.1."""
    bright_share: PositiveFloat | None = 0.05
    """Rise of the share of bright pixels, luminance above 0.9."""
    saturation: PositiveFloat | None = 0.25
    """Rise of the mean difference of a pixel's largest and smallest channel, as a share of its start."""
    colour_entropy: PositiveFloat | None = 0.15
    """Fall of the entropy of an image's colours, as a share of its start."""
    edge_density: PositiveFloat | None = 0.2
    """Fall of the share of pixels on an edge, as a share of its start."""
    group_diversity: PositiveFloat | None = 0.2
    """Fall of the mean distance between the candidates of a prompt, as a share of its start."""
    prompt_diversity: PositiveFloat | None = 0.1
    """Fall of the mean distance between images of different prompts, as a share of its start."""


class MonitorConfig(Section):
    enabled: bool = True
    """Watch rewards and candidates' images for signs that a reward is hacked (docs/hack_monitor.md)."""
    every: PositiveInt = 1
    """Steps with preference updates between two probes: the groups of one preference update, always of the same prompts and noise, rolled
    out and rewarded with the weights of the step, and not trained on."""
    warmup: PositiveInt = 3
    """Probes whose median is the start that everything is compared with. The first sees the weights before any update."""
    window: PositiveInt = 5
    """Probes whose median is compared with it: the last so many."""
    reward_rise: Annotated[float, Field(ge=0)] = 0.02
    """Rise of an optimised reward, in units of its spread over candidates at the start, up to which nothing counts as hacking."""
    limits: MonitorLimits = MonitorLimits()
    """How far each signal may move."""
    action: Literal["report", "lower", "stop"] = "report"
    """What a verdict of hacking does. lower: scales the learning rate of preference updates (under AdamW a smaller weight of the loss would
    change nothing). stop: ends the run with exit code 3. The newest checkpoint written while healthy is kept whatever the action."""
    lower_by: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of the action 'lower'; again when a further `window` of probes is still hacking."""


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

    def pieces(self, pool: str, groups: int) -> int:
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
        hops = len(self.sampling.timesteps) - 1
        if not hops:
            raise ValueError(
                "preference.updates: candidates need a hop to a next timestep, a one-step generator has none; set it to 0"
            )
        if (self.preference.high_noise or 0) > hops:
            raise ValueError(
                f"preference.high_noise: candidates need a hop to a next timestep and {list(self.sampling.timesteps)} has {hops}; "
                f"set it to at most {hops}"
            )
        if all(reward.held_out for reward in self.rewards):
            raise ValueError(
                "rewards: preference updates need at least one reward that is not held out; add one or set preference.updates to 0"
            )


_GROUPS = ("learner", "discriminator", "rollout")
"""Worker groups that are not reward pools."""


def _most_workers(placed: GroupConfig) -> int:
    grown = placed.max_workers if isinstance(placed, PoolConfig) else None
    return grown or placed.workers


def suggestion(word: str, known: Sequence[str]) -> str:
    """', did you mean ...?' for the nearest known word, else ''."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean '{near[0]}'?" if near else ""


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """`load_as` of a joint training run; the shipped demo when `path` is None."""
    return load_as(Config, DEFAULT_CONFIG if path is None else path, overrides)


def load_as(section: type[_Section], path: Path, overrides: Sequence[str] = ()) -> _Section:
    """Read a YAML file, apply `key.sub=value` overrides and validate it as that section.

    Raises ValueError, one line per problem, naming the key, what is wrong and the remedy.
    """
    source = Path(path)
    try:
        tree = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{source}: cannot read the configuration ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{source}: expected keys and values at the top level, found a {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return validated(section, tree)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping. Raises ValueError like `load_config`."""
    return validated(Config, tree)


def validated(section: type[_Section], tree: Mapping[str, Any]) -> _Section:
    """`tree` as a section of settings. Raises ValueError, one line per problem, naming the key and the remedy."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(_describe(section, detail) for detail in error.errors())
        raise ValueError("\n".join(lines)) from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key.sub=value` (a YAML value) in a nested mapping. Raises ValueError when it is not of that form."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ValueError(f"--set {override}: expected key=value, for example --set steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override}: the value is not valid YAML; quote it") from None
    for depth, part in enumerate(parts[:-1], start=1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ValueError(
                f"--set {override}: '{'.'.join(parts[:depth])}' is a single value or a list, it has no key '{parts[depth]}'"
            )
    tree[parts[-1]] = value


def _describe(section: type[Section], detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parents, key = detail["loc"][:-1], str(detail["loc"][-1])
        return f"{where}: unknown key{suggestion(key, _keys_at(section, parents))}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _keys_at(root: type[Section], location: Sequence[int | str]) -> list[str]:
    section: Any = root
    named = False  # the next part is a name of the user's, in a mapping of sections
    for part in location:
        if isinstance(part, int) or named:
            named = False
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
        named = get_origin(annotation) is dict
    return list(section.model_fields)


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML, ready to be run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
