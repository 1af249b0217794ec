"""Sizes of published models, so that a run can be planned before anything is downloaded. Imports no torch.

Architectures are what the config.json of each model's public repository says; parameter counts are those of stock diffusers and
transformers modules built from them (tests/plan/test_plan_published.py builds them again).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """Size of one model. config: as in its config.json. parameters: of all its weights."""

    config: Json
    parameters: int


@dataclass(frozen=True)
class Pipeline:
    """Sizes of a teacher. parts: its denoiser, "vae" and text encoders by their folders."""

    family: str
    parts: Mapping[str, Model]


def _clip_text(width: int, layers: int, heads: int, activated: int, projection: int | None) -> Json:
    kind = "CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"
    return {
        "architectures": [kind],
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": activated,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 77,
        "projection_dim": projection or width,
    }


CLIP_L = Model(_clip_text(768, 12, 12, 3072, None), 123_060_480)
CLIP_L_PROJECTED = Model(_clip_text(768, 12, 12, 3072, 768), 123_650_304)
CLIP_BIG_G = Model(_clip_text(1280, 32, 20, 5120, 1280), 694_659_840)
T5_XXL = Model(
    {
        "architectures": ["T5EncoderModel"],
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
    4_762_310_656,
)

_VAE: Json = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE = Model(_VAE, 83_653_863)
VAE_16 = Model({**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 83_819_683)

SDXL_UNET = Model(
    {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    2_567_463_684,
)
SD15_UNET = Model(
    {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    859_520_964,
)
SD3_MEDIUM = Model(
    {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    2_028_328_000,
)

_SDXL = Pipeline("sdxl", {"unet": SDXL_UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_BIG_G})
_SD15 = Pipeline("sd15", {"unet": SD15_UNET, "vae": VAE, "text_encoder": CLIP_L})
_SD3 = Pipeline(
    "sd3",
    {
        "transformer": SD3_MEDIUM,
        "vae": VAE_16,
        "text_encoder": CLIP_L_PROJECTED,
        "text_encoder_2": CLIP_BIG_G,
        "text_encoder_3": T5_XXL,
    },
)
PIPELINES: Mapping[str, Pipeline] = {
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD15,
    "stabilityai/stable-diffusion-3-medium-diffusers": _SD3,
}
"""Teachers by their hub id."""

VAES: Mapping[str, Model] = {"madebyollin/sdxl-vae-fp16-fix": VAE, "stabilityai/sdxl-vae": VAE}
"""VAEs by their hub id."""

PICKSCORE = Model(
    {
        "architectures": ["CLIPModel"],
        "projection_dim": 1024,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 77,
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
    },
    986_109_441,
)
CLIP_LARGE = Model(
    {
        "architectures": ["CLIPModel"],
        "projection_dim": 768,
        "text_config": {**CLIP_L_PROJECTED.config, "hidden_act": "quick_gelu"},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
        },
    },
    427_616_513,
)
CLIP_MODELS: Mapping[str, Model] = {
    "yuvalkirstain/PickScore_v1": PICKSCORE,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": PICKSCORE,
    "openai/clip-vit-large-patch14": CLIP_LARGE,
}
"""Of the form of CLIPModel, by their hub id."""


IMAGEREWARD = Model(
    {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 35,  # tokens that are read
            "encoder_hidden_size": 1024,
        },
    },
    446_206_689,
)
AESTHETIC = Model({"vision_config": CLIP_LARGE.config["vision_config"]}, 304_894_177)
MPS = Model({**PICKSCORE.config, "cross_layers": 4}, 1_104_606_721)
LATENT_REWARDS: Mapping[str, Model] = {
    "casiatao/LRM/lrm_sdxl": Model({"unet": SDXL_UNET.config, "text_width": 1280, "lpo": True}, 2_065_592_961),
    "casiatao/LRM/lrm_sd15": Model({"unet": SD15_UNET.config, "text_width": 768, "lpo": True}, 476_049_665),
}
"""LPO's, by owner/name/folder on the hub: the U-Net without its up path, the projections, and text encoders of their own."""


def _sam(width: int, depth: int, heads: int, every: int) -> Json:
    levels = [every * k + every - 1 for k in range(4)]
    sizes = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads, "window_size": 14}
    return {**sizes, "global_attn_indexes": levels}


SAM: Mapping[str, Model] = {
    "vit_b": Model(_sam(768, 12, 12, 3), 93_735_472),
    "vit_l": Model(_sam(1024, 24, 16, 6), 312_342_832),
    "vit_h": Model(_sam(1280, 32, 16, 8), 641_090_608),
}
"""Segment Anything by the name in its file, sam_<name>_*.pth; parameters with prompt encoder and mask decoder."""

IDS = frozenset([*PIPELINES, *VAES, *CLIP_MODELS])
"""Hub ids above."""
