"""Model families by name, and what is known of each without loading it. A family is one row here and one file in models/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UNET_KEYS = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": None,
    "down_block_types": None,
    "up_block_types": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "cross_attention_dim": 1280,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "norm_num_groups": 32,
    "time_cond_proj_dim": None,
}
"""Keys of a U-Net's config.json that shape it, with the value of an absent one."""
MMDIT_KEYS = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
    "qk_norm": None,
}
"""The same of SD3's transformer."""
UNCONDITIONED = dict.fromkeys(("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim"))
"""Keys of a U-Net's config.json that ask for one more input: a class, an image, or the guidance scale of a distilled student."""


@dataclass(frozen=True)
class FamilyEntry:
    """One model family. Everything that other packages must know of it is a field, so that none compares names."""

    family: str
    """module:Class of its `Family`."""
    pipeline: str
    """Pipeline class that its directories name in model_index.json."""
    denoiser: str
    """Sub-folder of the denoiser, and the key of its configuration in a saved latent reward."""
    denoiser_class: str
    """module:Class of its `Denoiser`."""
    network: str
    """Stock class that the denoiser's config.json names."""
    denoiser_keys: Mapping[str, Any]
    """Keys of the denoiser's config.json that shape it, with the value of an absent one."""
    latent_reward: str
    """module:Class of the `LatentRewardModel` that is made of its denoiser."""
    text_encoders: Mapping[str, str]
    """Sub-folder of each text encoder -> how its weights start in a single file of the original layout."""
    pooled_encoders: tuple[str, ...] = ()
    """Text encoders whose projections, side by side, are the pooled prompt embedding; empty when the family has none."""
    optional_encoders: Mapping[str, str] = field(default_factory=dict)
    """As text_encoders, those that are loaded on request: `model.t5`."""
    optional_tokens: int = 0
    """Tokens that the optional encoder adds to CLIP's. Without it the denoiser reads as many zeros as CLIP has tokens."""
    fixed_keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the denoiser's config.json that must have this value: others condition it on something that is not given."""
    latent_statistics: bool = False
    """Whether the stock pipeline reads latents_mean and latents_std of the VAE."""
    latent_shift: bool = False
    """Whether the stock pipeline reads shift_factor of the VAE."""
    micro_conditioning: bool = False
    """Whether `model.original_size` and `model.crop` mean something."""
    latent_reward_blocks: bool = False
    """Whether `latent_reward.blocks` chooses how many blocks a latent reward keeps."""
    lpo_base: str | None = None
    """Hub id of the pipeline whose tokenizers go with LPO's published latent reward; None when there is no such reward."""
    demo: str | None = None
    """Part of the demo weights with its teacher; None when there is none."""
    demo_latent_reward: str | None = None
    """Part of the demo weights with its latent reward; None when there is none."""

    def text_tokens(self, clip_tokens: int, optional: bool) -> int:
        """Tokens that the denoiser reads. optional: whether the optional encoder is loaded."""
        if not self.optional_encoders:
            return clip_tokens
        return clip_tokens + (self.optional_tokens if optional else clip_tokens)


FAMILIES: Mapping[str, FamilyEntry] = {
    "sdxl": FamilyEntry(
        family="flashdmd_ray.models.sdxl:SDXL",
        pipeline="StableDiffusionXLPipeline",
        denoiser="unet",
        denoiser_class="flashdmd_ray.models.denoiser:UNetDenoiser",
        network="UNet2DConditionModel",
        denoiser_keys=UNET_KEYS,
        latent_reward="flashdmd_ray.models.latent_reward.unet:UNetLatentReward",
        text_encoders={"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."},
        pooled_encoders=("text_encoder_2",),
        fixed_keys={**UNCONDITIONED, "addition_embed_type": "text_time"},
        latent_statistics=True,
        micro_conditioning=True,
        lpo_base="stabilityai/stable-diffusion-xl-base-1.0",
        demo="teacher",
        demo_latent_reward="latent_reward",
    ),
    "sd15": FamilyEntry(
        family="flashdmd_ray.models.sd15:SD15",
        pipeline="StableDiffusionPipeline",
        denoiser="unet",
        denoiser_class="flashdmd_ray.models.denoiser:UNetDenoiser",
        network="UNet2DConditionModel",
        denoiser_keys=UNET_KEYS,
        latent_reward="flashdmd_ray.models.latent_reward.unet:UNetLatentReward",
        text_encoders={"text_encoder": "cond_stage_model."},
        fixed_keys={**UNCONDITIONED, "addition_embed_type": None},
        lpo_base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd3": FamilyEntry(
        family="flashdmd_ray.models.sd3:SD3",
        pipeline="StableDiffusion3Pipeline",
        denoiser="transformer",
        denoiser_class="flashdmd_ray.models.sd3:SD3Denoiser",
        network="SD3Transformer2DModel",
        denoiser_keys=MMDIT_KEYS,
        latent_reward="flashdmd_ray.models.latent_reward.mmdit:MMDiTLatentReward",
        text_encoders={"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g."},
        pooled_encoders=("text_encoder", "text_encoder_2"),
        optional_encoders={"text_encoder_3": "text_encoders.t5xxl."},
        optional_tokens=256,
        latent_reward_blocks=True,
        latent_shift=True,
        demo="teacher_sd3",
    ),
}
"""Model families by `model.family`."""


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
