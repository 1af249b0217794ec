"""Small random models in the published formats: what a test needs when the shipped weights would be too particular."""

from __future__ import annotations

import string
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models.original_layout import original_weights

LENGTH = 12


def tokenizer(length: int = LENGTH) -> CLIPTokenizer:
    """CLIP's tokenizer over letters: every word falls apart into characters."""
    letters = string.ascii_lowercase + string.digits
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=length,
    )


def text_config(width: int, vocabulary: int, length: int = LENGTH, **changes: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        **changes,
    )


def sdxl_pipeline(prediction_type: str = "epsilon", zeros: bool = True, seed: int = 0) -> StableDiffusionXLPipeline:
    """A random StableDiffusionXLPipeline: 16x16 images, latents (4, 8, 8) with scaling factor 0.5."""
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config(8, len(words))),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, len(words))),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=vp_scheduler(prediction_type),
        force_zeros_for_empty_prompt=zeros,
    )


def tiny_vae(channels: int = 4, **changes: object) -> AutoencoderKL:
    """16x16 images, latents (channels, 8, 8) with scaling factor 0.5."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **{"scaling_factor": 0.5, "force_upcast": False} | changes,
    )


def vp_scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )


def sd15_pipeline(
    prediction_type: str = "epsilon", seed: int = 0, activation: str = "quick_gelu"
) -> StableDiffusionPipeline:
    """A random StableDiffusionPipeline: 16x16 images, latents (4, 8, 8)."""
    torch.manual_seed(seed)
    words = tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=8,
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(text_config(8, len(words), hidden_act=activation)),
        tokenizer=words,
        unet=unet,
        scheduler=vp_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """A unigram tokenizer over letters."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase, *string.digits]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def sd3_pipeline(t5: bool = False, shift: float = 3.0, seed: int = 0, **changes: object) -> StableDiffusion3Pipeline:
    """A random StableDiffusion3Pipeline: 16x16 images, latents (4, 8, 8) with a shift factor, three blocks."""
    torch.manual_seed(seed)
    words, pieces = tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 24,
            "pos_embed_max_size": 6,
        }
        | changes
    )
    t5_config = T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return StableDiffusion3Pipeline(
        vae=tiny_vae(shift_factor=0.25),
        text_encoder=CLIPTextModelWithProjection(text_config(8, len(words))),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16, len(words))),
        text_encoder_3=T5EncoderModel(t5_config).eval() if t5 else None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=pieces if t5 else None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )


def save_sdxl(path: Path, **arguments: object) -> Path:
    sdxl_pipeline(**arguments).save_pretrained(path)  # type: ignore[arg-type]
    return path


def write_single_file(pipeline: DiffusionPipeline, family: str, path: Path) -> Path:
    """All weights in one .safetensors file of the original layout."""
    weights = original_weights(pipeline, FAMILIES[family])
    save_file({name: tensor.contiguous().clone() for name, tensor in weights}, path)
    return path


def save_sd15(path: Path, **arguments: object) -> Path:
    sd15_pipeline(**arguments).save_pretrained(path)  # type: ignore[arg-type]
    return path


def save_sd3(path: Path, **arguments: object) -> Path:
    sd3_pipeline(**arguments).save_pretrained(path)  # type: ignore[arg-type]
    return path


def sam_encoder(image_size: int = 32) -> ImageEncoderViT:
    """A random image encoder of Segment Anything, with windows and two global blocks."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=4,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        out_chans=8,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1, 3),
    )
    for name, value in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(value)
    return encoder


def save_sam(path: Path) -> Path:
    """An official-style .pth file of that encoder."""
    state = {f"image_encoder.{name}": value for name, value in sam_encoder().state_dict().items()}
    torch.save({**state, "mask_decoder.iou_token.weight": torch.zeros(1, 8)}, path)
    return path
