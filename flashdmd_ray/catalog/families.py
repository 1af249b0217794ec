"""Model families by name, and what is known of each without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FamilyEntry:
    """What is known of a model family without loading it."""

    adapter: str
    """module:Class of its `Family`."""
    pipeline: str
    """The pipeline class that its directories name in model_index.json."""
    denoiser: str
    """The sub-folder of the denoiser."""
    text_encoders: Mapping[str, str]
    """Sub-folder of each text encoder -> how its weights start in a single file of the original layout."""
    demo: str | None
    """Its part of the demo weights; None when there are none."""
    optional: Mapping[str, str]
    """As text_encoders, those that are loaded on request: `model.t5`."""


FAMILIES = {
    "sdxl": FamilyEntry(
        adapter="flashdmd_ray.models.sdxl:SDXL",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        text_encoders={"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
        demo="teacher",
        optional={},
    ),
    "sd15": FamilyEntry(
        adapter="flashdmd_ray.models.sd15:SD15",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        text_encoders={"text_encoder": "cond_stage_model."},
        demo=None,
        optional={},
    ),
    "sd3": FamilyEntry(
        adapter="flashdmd_ray.models.sd3:SD3",
        pipeline="StableDiffusion3Pipeline",
        denoiser="transformer",
        text_encoders={"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g."},
        demo="teacher_sd3",
        optional={"text_encoder_3": "text_encoders.t5xxl."},
    ),
}
"""Model families by their name in the configuration."""


def latent_size(
    resolution: Sequence[int] | None, network: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Height and width of the latents of images of `resolution` (height, width), and how many pixels a latent spans.

    network, vae: the JSON configurations of denoiser and VAE; a resolution of None is the denoiser's own size. Raises
    ValueError naming `model.resolution` when it does not fit them.
    """
    pixels = 2 ** (len(vae["block_out_channels"]) - 1)
    if resolution is None:
        return int(network["sample_size"]), int(network["sample_size"]), pixels
    step = pixels * int(network.get("patch_size") or 1)
    if any(side % step for side in resolution):
        raise ValueError(f"model.resolution: {list(resolution)} must be multiples of {step} for this teacher")
    longest = network.get("pos_embed_max_size")
    if longest and max(resolution) > step * longest:
        raise ValueError(
            f"model.resolution: {list(resolution)} is larger than this teacher's {step * longest} pixels per side"
        )
    return resolution[0] // pixels, resolution[1] // pixels, pixels
