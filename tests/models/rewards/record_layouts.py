"""Names and shapes of the published checkpoints, written to layouts.json.gz: `python -m tests.models.rewards.record_layouts`.

Published names, not ours: CLIP's from stock transformers and open_clip modules at full size on the meta device, the others listed
here as the authors' code makes them (ImageReward on BLIP and BERT base, LAION's head, MPS's cross model, LPO's folders).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel

from flashdmd_ray.catalog import published

FILE = Path(__file__).with_name("layouts.json.gz")
Layout = dict[str, list[int]]


def of_module(module: nn.Module, start: str = "") -> Layout:
    return {f"{start}{name}": list(value.shape) for name, value in module.state_dict().items()}


def clip(model: published.Model) -> Layout:
    settings = {key: value for key, value in model.config.items() if key != "architectures"}
    with torch.device("meta"):
        layout = of_module(CLIPModel(CLIPConfig(**settings)))
    # Saved with the weights until transformers 4.31, as in pytorch_model.bin of PickScore and of OpenAI's CLIP.
    positions = {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, 257]}
    return layout | positions


def hpsv2() -> Layout:
    with torch.device("meta"):
        return of_module(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")))


def pairs(sizes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, list[int]]]:
    """A weight of that shape and a bias as long as its first dimension, each."""
    for name, shape in sizes.items():
        yield f"{name}.weight", list(shape)
        yield f"{name}.bias", [shape[0]]


def head(start: str) -> Layout:
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return dict(pairs({f"{start}layers.{place}": shape for place, shape in widths.items()}))


def imagereward() -> Layout:
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    layout: Layout = {f"{v}cls_token": [1, 1, 1024], f"{v}pos_embed": [1, 197, 1024]}
    layout |= dict(pairs({f"{v}patch_embed.proj": (1024, 3, 16, 16), f"{v}norm": (1024,)}))
    for block in (f"{v}blocks.{i}." for i in range(24)):
        layout |= dict(pairs({f"{block}norm1": (1024,), f"{block}norm2": (1024,), f"{block}attn.qkv": (3072, 1024)}))
        layout |= dict(pairs({f"{block}attn.proj": (1024, 1024), f"{block}mlp.fc1": (4096, 1024)}))
        layout |= dict(pairs({f"{block}mlp.fc2": (1024, 4096)}))
    layout |= {f"{t}embeddings.position_ids": [1, 512], f"{t}embeddings.word_embeddings.weight": [30524, 768]}
    layout |= {
        f"{t}embeddings.position_embeddings.weight": [512, 768],
        **dict(pairs({f"{t}embeddings.LayerNorm": (768,)})),
    }
    for layer in (f"{t}encoder.layer.{i}." for i in range(12)):
        for kind, width in (("attention", 768), ("crossattention", 1024)):
            layout |= dict(pairs({f"{layer}{kind}.self.query": (768, 768), f"{layer}{kind}.self.key": (768, width)}))
            layout |= dict(
                pairs({f"{layer}{kind}.self.value": (768, width), f"{layer}{kind}.output.dense": (768, 768)})
            )
            layout |= dict(pairs({f"{layer}{kind}.output.LayerNorm": (768,)}))
        layout |= dict(pairs({f"{layer}intermediate.dense": (3072, 768), f"{layer}output.dense": (768, 3072)}))
        layout |= dict(pairs({f"{layer}output.LayerNorm": (768,)}))
    layout |= dict(pairs({"blip.vision_proj": (256, 1024), "blip.text_proj": (256, 768)}))
    return layout | head("mlp.")


def mps() -> Layout:
    layout = {f"model.{name}": shape for name, shape in clip(published.PICKSCORE).items()}
    for layer in range(4):
        cross, own = f"cross_model.layers.{layer}.0.fn.", f"cross_model.layers.{layer}.1.fn."
        layout |= {f"{start}norm.{leaf}": [1024] for start in (cross, own) for leaf in ("weight", "bias")}
        layout |= {f"{cross}to_q.weight": [1024, 1024], f"{cross}to_kv.weight": [128, 1024]}
        layout |= {f"{cross}to_out.weight": [1024, 1024], f"{cross}ff.0.weight": [8192, 1024]}
        layout |= {f"{cross}ff.2.weight": [1024, 4096], f"{own}rotary_emb.inv_freq": [32]}
        layout |= {f"{own}fused_attn_ff_proj.weight": [1024 + 64 + 64 + 8192, 1024]}
        layout |= {f"{own}attn_out.weight": [1024, 1024], f"{own}ff_out.1.weight": [1024, 4096]}
    return layout


def lrm(unet: published.Model, projections: Layout) -> dict[str, Any]:
    """The authors save the whole U-Net, in diffusers' format."""
    with torch.device("meta"):
        whole = of_module(UNet2DConditionModel.from_config(dict(unet.config)))
    return {"config": dict(unet.config), "unet": whole, "state_dict.pt": projections}


def read() -> dict[str, Any]:
    """What was recorded."""
    found: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))
    return found


def state_of(layout: Layout) -> dict[str, torch.Tensor]:
    """Tensors of these shapes without a byte of memory."""
    return {name: torch.empty(shape, device="meta") for name, shape in layout.items()}


def layouts() -> dict[str, Any]:
    both = {"visual_projection.weight": [1280, 3520], "logit_scale": []}
    three = {"visual_projection.weight": [768, 4800], "text_projection.weight": [768, 768], "logit_scale": []}
    return {
        "pickscore": clip(published.PICKSCORE),
        "clipscore": clip(published.CLIP_LARGE),
        "hpsv2": hpsv2(),
        "imagereward": imagereward(),
        "aesthetic": head(""),
        "mps": mps(),
        "lrm_sdxl": lrm(published.SDXL_UNET, both),
        "lrm_sd15": lrm(published.SD15_UNET, three),
    }


if __name__ == "__main__":
    FILE.write_bytes(gzip.compress(json.dumps(layouts(), separators=(",", ":")).encode(), mtime=0))
