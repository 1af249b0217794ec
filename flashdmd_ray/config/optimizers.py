"""Settings of weight updates: learning rates, AdamW, and the engine that does it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flashdmd_ray.config.section import Count, Fraction, MayChange, PositiveFloat, PositiveInt, Section


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
    """Decay rates of AdamW's first and second moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's, decoupled: an update also takes lr x weight_decay of every weight off. Preference updates do so at their own rate."""
    clip: PositiveFloat = 1.0
    """[open] Global gradient norm above which gradients are scaled down (DMD2: 10, SenseFlow: 1). At 1 nearly every update of the demo's
    generator is scaled; AdamW divides a constant scale out again."""


class EngineConfig(Section):
    kind: MayChange[Literal["torch", "deepspeed"]] = "torch"
    """What trains the generator and the score estimator: every rank alone with all of it, or sharded by DeepSpeed ZeRO."""
    zero_stage: MayChange[Literal[1, 2, 3]] = 1
    """deepspeed only. What ranks share out: 1 masters and moments, 2 gradients too, 3 weights too."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the trained networks. Masters and moments are float32 in either. (float16 would need loss scaling.)"""
    accumulation: MayChange[Literal["auto"] | PositiveInt] = "auto"
    """Micro-batches per update, one after the other: less memory for activations, the same update. auto: the fewest whose planned memory
    fits the GPU of a joint training; 1 elsewhere."""
    gradient_checkpointing: MayChange[bool] = False
    """Compute activations of the denoisers, SAM and the VAE decoder again in the backward pass instead of keeping them."""
    offload_optimizer: MayChange[bool] = False
    """Masters, moments and the optimizer's step in host memory. Saves nothing on a machine without a GPU."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit: moments of 8 bits in blocks of 256 with one scale each; kind 'torch' only, needs the extra 'low-memory'."""
    compile: MayChange[bool] = False
    """torch.compile of the trained networks; not with ZeRO stage 3, whose gathering it cannot follow."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update; 1 where the plan has not chosen."""
        return 1 if self.accumulation == "auto" else self.accumulation

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
