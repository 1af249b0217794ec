"""Small random models of the published classes, written in the published files, and what they are asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flashdmd_ray.models.rewards import PixelReward, build_reward
from flashdmd_ray.models.rewards.heads import WIDTHS
from tests.tiny import text_config, tokenizer

SIDE = 16
TEXTS = ["a red 4", "two blue 7s left of a cup that goes on and on", "", "a red 4", "x"]
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def random_(module: torch.nn.Module, spread: float = 0.2) -> torch.nn.Module:
    """Weights so large that every part of a network changes its result."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def write_clip(path: Path, width: int = 16, projection: int = 8, sign: int = 1) -> Path:
    """A CLIPModel with tokenizer and image processor, with an argmax-EOT text tower as the published ones have."""
    torch.manual_seed(0)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=4,
        projection_dim=projection,
    )
    text = text_config(width, len(words)).to_dict() | {"projection_dim": projection, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.to_dict(), projection_dim=projection))
    random_(clip, 0.05).visual_projection.weight.data.mul_(sign)
    clip.save_pretrained(path)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(processor, words).save_pretrained(path)
    return path


def write_clipscore(path: Path) -> Path:
    """The same with positive cosines, which CLIPScore does not cut off."""
    return write_clip(path, sign=-1)


def write_hpsv2(path: Path) -> Path:
    """A directory in open_clip's own format."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(random_(open_clip.CLIP(**OPEN_CLIP), 0.05).state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    return path


def head(width: int, start: str) -> dict[str, Tensor]:
    """The linear layers of a head under their published names."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), (width, *WIDTHS[:-1]), WIDTHS, strict=True):
        state[f"{start}layers.{place}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"{start}layers.{place}.bias"] = torch.randn(outputs, generator=generator)
    return state


def write_aesthetic(path: Path) -> Path:
    """LAION's file and, beside it, the CLIP whose images it judges."""
    write_clip(path)
    torch.save(head(8, ""), path / "sac+logos+ava1-l14-linearMSE.pth")
    return path


_BLIP_NAMES = (
    ("encoder.layers.", "blocks."),
    ("post_layernorm.", "norm."),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".layer_norm", ".norm"),
)


def published_blip_name(name: str) -> str:
    """BLIP's own name of a weight of transformers' BlipVisionModel."""
    for ours, theirs in _BLIP_NAMES:
        name = name.replace(ours, theirs)
    return name


def write_imagereward(path: Path) -> Path:
    """ImageReward.pt, med_config.json and BERT's tokenizer. Heads of 64, as all of BLIP's."""
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    letters = [chr(code) for code in range(97, 123)] + [str(digit) for digit in range(10)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    BertTokenizer(vocab={word: place for place, word in enumerate(words)}).save_pretrained(path)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=4,
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(words) + 2,
            hidden_size=24,
            encoder_hidden_size=128,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=40,
            is_decoder=True,
        ),
        add_pooling_layer=False,
    )
    state = {f"blip.visual_encoder.{published_blip_name(n)}": v for n, v in random_(vision, 0.05).state_dict().items()}
    state |= {f"blip.text_encoder.{n}": v for n, v in random_(text, 0.05).state_dict().items()}
    state |= {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None], **head(24, "mlp.")}
    state |= {"blip.vision_proj.weight": torch.zeros(3, 128), "blip.text_proj.bias": torch.zeros(3)}
    torch.save(state, path / "ImageReward.pt")
    (path / "med_config.json").write_text(json.dumps({"num_attention_heads": 3}))
    return path


def cross_weights(width: int, layers: int = 4) -> dict[str, Tensor]:
    """MPS's cross model under its published names."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {}
    for layer in range(layers):
        cross, own = f"cross_model.layers.{layer}.0.fn.", f"cross_model.layers.{layer}.1.fn."
        state |= {f"{start}norm.weight": 1 + 0.1 * torch.randn(width, generator=generator) for start in (cross, own)}
        state |= {f"{start}norm.bias": torch.zeros(width) for start in (cross, own)}
        state |= {f"{cross}to_q.weight": 3 * drawn(width, width), f"{cross}to_kv.weight": drawn(128, width)}
        state |= {f"{cross}to_out.weight": drawn(width, width), f"{cross}ff.0.weight": drawn(8 * width, width)}
        state |= {f"{cross}ff.2.weight": drawn(width, 4 * width), f"{own}ff_out.1.weight": drawn(width, 4 * width)}
        state |= {
            f"{own}fused_attn_ff_proj.weight": drawn(9 * width + 128, width),
            f"{own}attn_out.weight": drawn(width, width),
        }
        state |= {f"{own}rotary_emb.inv_freq": 10000.0 ** -(torch.arange(0, 64, 2) / 64)}
    return state


def write_mps(path: Path) -> Path:
    """Converted weights in the published names, and CLIP's configuration, tokenizer and processor."""
    write_clip(path, 64, 128)
    clip = {f"model.{name}": value for name, value in CLIPModel.from_pretrained(path).state_dict().items()}
    clip |= {"model.text_model.embeddings.position_ids": torch.arange(12)[None]}
    clip["model.text_model.embeddings.token_embedding.weight"] *= 30  # words so unlike each other that some are masked
    (path / "model.safetensors").unlink()
    save_file(clip | cross_weights(128), path / "model.safetensors")
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "pickscore": write_clip,
    "clipscore": write_clipscore,
    "hpsv2": write_hpsv2,
    "hpsv2.1": write_hpsv2,
    "imagereward": write_imagereward,
    "aesthetic": write_aesthetic,
    "mps": write_mps,
}


def small_reward(kind: str, path: Path, **settings: object) -> PixelReward:
    """A random model of that kind, written to `path` if there is nothing yet, and read."""
    written = path if any(path.iterdir()) else WRITERS[kind](path)
    model = build_reward(kind, str(written), **settings)
    assert isinstance(model, PixelReward)
    return model


def bytes_as_images(pixels: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def photos(count: int, height: int, width: int) -> Tensor:
    """Smooth uint8 images: a random 3x3 colour field, enlarged."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (smooth * 255).round().byte()


def noise_bytes(count: int, height: int, width: int) -> Tensor:
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
