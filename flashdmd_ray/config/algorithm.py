"""Settings of Algorithm 1: few-step sampling, score estimator, losses and preference RL."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, field_validator

from flashdmd_ray.config.optimizers import OptimizerConfig, RateConfig
from flashdmd_ray.config.section import (
    Count,
    Fraction,
    MayChange,
    PathOrName,
    PositiveFloat,
    PositiveInt,
    Section,
    Timestep,
)


class SamplingConfig(Section):
    timesteps: tuple[Timestep, ...] = (999, 749, 499, 249)
    """Denoising timesteps of the generator, strictly descending; 1, 2, 4 or 8 of them are usual."""

    @field_validator("timesteps")
    @classmethod
    def _descending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(a <= b for a, b in itertools.pairwise(value)):
            raise ValueError(f"must be a strictly descending list such as [999, 749, 499, 249], got {list(value)}")
        return value


class GeneratorConfig(OptimizerConfig):
    start: PathOrName | None = None
    """Few-step student to start from instead of the teacher: a pipeline's directory or hub id (an export, SDXL-Turbo), a file of the
    network's weights under diffusers' names (DMD2, Lightning) or a .safetensors LoRA (LCM), which is merged. Whole networks only."""


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
    timestep_split: Literal["timestep_aware", "shared"] = "timestep_aware"
    """timestep_aware: distribution matching at high noise, GAN at the last timestep (Flash-DMD).
    shared: both on one forward at any timestep (DMD2)."""
    timestep_per: Literal["sample", "batch"] = "sample"
    """[open] Draw the high-noise step for each sample, or once for the whole batch. With 'batch' each update of the score estimator sees
    one step's samples only, and it lags behind on the others' (docs/trials.md)."""
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
    accumulation: MayChange[Literal["auto"] | PositiveInt] = "auto"
    """Micro-batches of the pixel discriminator's updates. Decoder and SAM need more memory for a sample than a denoiser, which runs faster
    on all of its batch at once. auto: the fewest whose planned memory fits the GPU; on CPUs as many as `engine.accumulation`."""
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
    """K candidates, renoised from one denoised latent; the best and the worst make the pair."""
    high_noise: PositiveInt | None = None
    """How many of the first denoising timesteps candidates are drawn at; null is 2 ({999, 749}), or 1 of a two-step generator."""
    beta: PositiveFloat = 15.0
    """[open] Temperature of -logsigmoid(beta H), the same at every resolution. It acts where |beta H| is 0.3 to 3 (metric
    `preference/beta_h`); far below, neither it nor the reference policy does anything. LPO's 500 is 2 in these units for SDXL."""
    lr: PositiveFloat = 2e-5
    """Learning rate of preference updates, at its highest; they keep AdamW moments and a count of updates of their own."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.45
    """[open] A pair is kept when the softmax over its group's rewards differs by more than this between best and worst. LPO: 0.45-0.6, on
    raw rewards. Rewards are normalised within the group here, so it keeps the groups in which one candidate stands out from the others,
    not those that differ much: of K = 4 groups of pure noise three in four pass 0.45."""
    temperature: PositiveFloat = 1.0
    """Divides the normalised rewards inside that softmax."""
    reward_timestep: Literal["current", "next"] = "next"
    """[open] Timestep given to a latent reward for a candidate z at t_next. LPO says the current t, 50 above the latent's own; between
    few-step timesteps that is 250 above it, and at the first step outside the range its reward was trained in."""
    candidate_image: Literal["one_step", "remaining_steps"] = "one_step"
    """How a candidate becomes a clean image for pixel rewards: one generator forward, or all remaining steps."""
    max_unscored: PositiveInt = 10
    """The run ends when so many preference updates in a row had no group that all its rewards could score."""
    decode_batch: PositiveInt = 8
    """Candidates that a rollout worker decodes at a time: what bounds its memory for the VAE (1.9 GiB each at 1024 pixels)."""
