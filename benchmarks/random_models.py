"""Model folders with random weights, of the size of published models: cost does not depend on what a network has learned.

The weights are drawn on the device that will train, in bfloat16 on a GPU, and written as a pipeline's usual files, so that what reads
them is what reads real ones. Tokenizers and noise schedule are the demo's, with the published length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flashdmd_ray.catalog import published
from flashdmd_ray.demo import weights_path
from flashdmd_ray.plan.measure.networks import build_sam

Json = Mapping[str, Any]
LENGTH = 77
"""Tokens of a prompt."""


@dataclass(frozen=True)
class Sizes:
    """Architectures as in each model's config.json. sam, reward: None for the demo's own, which are small."""

    unet: Json
    vae: Json
    text: Json
    text_2: Json
    sam: Json | None
    reward: Json | None


def _smaller_text(text: Json, width: int) -> Json:
    small = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**text, **small, "projection_dim": width}


SIZES = {
    "sdxl": Sizes(
        published.SDXL_UNET.config,
        published.VAE.config,
        published.CLIP_L.config,
        published.CLIP_BIG_G.config,
        published.SAM["vit_b"].config,
        published.PICKSCORE.config,
    ),
    "tiny": Sizes(
        {
            **published.SDXL_UNET.config,
            "sample_size": 8,
            "layers_per_block": 1,
            "block_out_channels": [32, 64, 64],
            "transformer_layers_per_block": [1, 1, 1],
            "attention_head_dim": [1, 2, 2],
            "cross_attention_dim": 48,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        {**published.VAE.config, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
        _smaller_text(published.CLIP_L.config, 16),
        _smaller_text(published.CLIP_BIG_G.config, 32),
        None,
        None,
    ),
}


def write_models(preset: str, folder: Path, device: torch.device) -> dict[str, Any]:
    """Draw and write the models of a preset; returns the configuration keys that name them."""
    sizes = SIZES[preset]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_config({**sizes.vae, "force_upcast": False}).to(dtype),
            text_encoder=CLIPTextModel(_text_config(sizes.text)).to(dtype),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(sizes.text_2)).to(dtype),
            tokenizer=_tokenizer(),
            tokenizer_2=_tokenizer(),
            unet=UNet2DConditionModel.from_config(dict(sizes.unet)).to(dtype),
            scheduler=DDPMScheduler.from_pretrained(weights_path("teacher"), subfolder="scheduler"),
        ).save_pretrained(folder / "teacher")
        named: dict[str, Any] = {"model.teacher": str(folder / "teacher"), "model.vae": None}
        if sizes.sam is not None:
            _write_sam(sizes.sam, folder / "sam_vit_random.pth")
            named["model.sam"] = str(folder / "sam_vit_random.pth")
        if sizes.reward is not None:
            _write_reward(sizes.reward, folder / "reward", dtype)
            named["rewards"] = [{"kind": "pickscore", "path": str(folder / "reward")}]
    return named


def _text_config(sizes: Json) -> CLIPTextConfig:
    words = _tokenizer()
    tokens = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextConfig(**{key: value for key, value in sizes.items() if key != "architectures"} | tokens)


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(weights_path("teacher"), subfolder="tokenizer", model_max_length=LENGTH)


def _write_sam(sizes: Json, file: Path) -> None:
    """Write a Segment Anything checkpoint in the official layout, which is for images of 1024 pixels."""
    weights = build_sam(sizes, 1024).state_dict()
    torch.save({f"image_encoder.{name}": tensor.cpu() for name, tensor in weights.items()}, file)


def _write_reward(sizes: Json, folder: Path, dtype: torch.dtype) -> None:
    config = CLIPConfig(**{key: value for key, value in sizes.items() if key != "architectures"})
    CLIPModel(config).to(dtype).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    side = config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)
