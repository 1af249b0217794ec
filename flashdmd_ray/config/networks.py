"""The networks: which they are, and what of them is trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from flashdmd_ray.catalog.families import FAMILIES, FamilyEntry
from flashdmd_ray.config.section import Count, PathOrName, PositiveFloat, PositiveInt, Section, suggestion


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        known = ", ".join(f"'{family}'" for family in FAMILIES)
        raise ValueError(f"unknown family '{name}'{suggestion(name, list(FAMILIES))}; known: {known}")
    return name


class ModelConfig(Section):
    family: Annotated[str, AfterValidator(_known_family), Field(json_schema_extra={"enum": list(FAMILIES)})] = "sdxl"
    """Which adapter of flashdmd_ray/models drives the networks. sd15: Stable Diffusion 1.5 and 2.1; sd3: 3 and 3.5. See docs/models.md."""
    teacher: PathOrName = "demo"
    """'demo' for the weights in the package, a directory or hub id of a diffusers pipeline, or one .safetensors file in the original
    layout."""
    teacher_config: PathOrName | None = None
    """Directory or hub id of the pipeline whose configuration and tokenizers go with a single-file teacher; null lets diffusers infer
    a hub id from the file."""
    vae: PathOrName | None = None
    """Directory or hub id of another VAE, such as madebyollin/sdxl-vae-fp16-fix, or one .safetensors file; null is the teacher's own."""
    t5: bool = False
    """SD3 only: load text_encoder_3, the T5. Without it the denoiser reads zeros in its place, as SD3 allows."""
    resolution: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] of the images that are trained on and sampled, in pixels; null is the teacher's own size."""
    original_size: tuple[PositiveInt, PositiveInt] | None = None
    """SDXL only: [height, width] that micro-conditioning states as the size before cropping; null is `resolution`."""
    crop: tuple[Count, Count] | None = None
    """SDXL only: [top, left] of the crop that micro-conditioning states; null is [0, 0], no crop."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the frozen networks: teacher, VAE, text encoders and SAM. What is trained: see engine.precision."""
    sam: PathOrName = "demo"
    """'demo', a directory with config.json and model.safetensors, or an official sam_vit_*.pth file."""

    @property
    def entry(self) -> FamilyEntry:
        """The registry's row of this family."""
        return FAMILIES[self.family]

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.teacher == "demo" and self.entry.demo is None:
            others = " or ".join(name for name, entry in FAMILIES.items() if entry.demo is not None)
            raise ValueError(
                f"teacher: the package has no demo weights of family '{self.family}'; name a teacher, or use family {others}"
            )
        if self.t5 and not self.entry.optional_encoders:
            raise ValueError(f"t5: family '{self.family}' has no T5; set it to false")
        if not self.entry.micro_conditioning and (self.original_size or self.crop):
            raise ValueError(
                f"original_size and crop: family '{self.family}' has no micro-conditioning; leave them null"
            )
        if self.teacher_config is not None and not self.teacher.endswith(".safetensors"):
            raise ValueError("teacher_config: goes with a single .safetensors file as teacher; leave it null")
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
