"""Segment Anything's image encoder as a frozen feature extractor, at any image size.

The official encoder accepts exactly one image size. Here its absolute and relative position tables are interpolated
once, at loading, so that a discriminator can read the size that the generator makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F

from flashdmd_ray.models.config_files import check_json
from flashdmd_ray.models.state_dicts import find_file, read_weights
from flashdmd_ray.models.stock_modules import load_part
from flashdmd_ray.models.weight_reading import weights_device

# The mean and deviation of pixels in 0..255 that Segment Anything was trained with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

_PREFIX = "image_encoder."


def load_sam_encoder(path: Path | str, image_size: int, dtype: torch.dtype = torch.float32) -> ImageEncoderViT:
    """The frozen encoder in eval mode for square images of `image_size` pixels, with fused attention.

    `path` is a directory with `config.json` and `model.safetensors` (the keys of `segment_anything.Sam`), or an
    official checkpoint such as `sam_vit_b_01ec64.pth`. The architecture follows from the shapes of the weights.
    Raises ValueError when the file is missing or no SAM checkpoint, or when the patch size does not divide
    `image_size`.
    """
    path = Path(path)
    state = _read_state(path)
    if any(name.startswith("vision_encoder.") for name in state):
        raise ValueError(
            f"{path} is Segment Anything in transformers' layout; name an official sam_vit_*.pth checkpoint"
        )
    encoder_state = {k.removeprefix(_PREFIX): v.float() for k, v in state.items() if k.startswith(_PREFIX)}
    if "pos_embed" not in encoder_state or "patch_embed.proj.weight" not in encoder_state:
        raise ValueError(f"{path} is not a Segment Anything checkpoint: no image encoder in it")
    patch = encoder_state["patch_embed.proj.weight"].shape[-1]
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size {image_size} is not a positive multiple of the encoder's patch size {patch}")
    with weights_device():
        encoder = _build(encoder_state, image_size)
    encoder.load_state_dict(_resize_tables(encoder_state, image_size // patch, encoder))
    return fuse_attention(encoder.to(dtype)).eval().requires_grad_(False)


class FusedAttention(nn.Module):
    """Segment Anything's attention with the weights of its own module, through torch's fused kernels.

        softmax(q k^T / sqrt(d) + r_h + r_w) v,   r_h[q, k] = <q, R_h[row of q - row of k]>, r_w the same of columns

    The relative positions go in as the bias. The official module writes all scores, their sums with r_h and r_w and their softmax,
    each (B, heads, HW, HW), and reads its tables at indices made on the CPU at every call.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, written: Any) -> None:
        """written: segment_anything's `Attention`, its position tables of the size it will see. Its parameters are shared."""
        super().__init__()
        self.heads = int(written.num_heads)
        self.qkv, self.proj = written.qkv, written.proj
        self.rel_pos_h, self.rel_pos_w = written.rel_pos_h, written.rel_pos_w
        for name, table in (("rows", self.rel_pos_h), ("columns", self.rel_pos_w)):
            size = (len(table) + 1) // 2
            places = torch.arange(size)
            self.register_buffer(name, places[:, None] - places + size - 1, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, H, W, C) to the same shape."""
        batch, height, width, channels = tokens.shape
        parts = self.qkv(tokens).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        by_place = query.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", by_place, self.rel_pos_h[self.rows])
        by_column = torch.einsum("bnhwc,wkc->bnhwk", by_place, self.rel_pos_w[self.columns])
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(batch, height, width, channels))


def fuse_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """Put `FusedAttention` into every block; returns the encoder."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn)
    return encoder


def global_attention_tokens(encoder: ImageEncoderViT, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens (B, H/p, W/p, C) after each global-attention block, shallow to deep, in the encoder's precision.

    `images` (B, 3, H, W) floating in [-1, 1], H = W = the size the encoder was loaded for (else ValueError).
    Gradients flow to the images.
    """
    if images.shape[-2:] != (encoder.img_size, encoder.img_size):
        raise ValueError(f"images are {tuple(images.shape[-2:])}, the encoder was loaded for {encoder.img_size}")
    pixels = normalise_pixels(images.float()).to(
        encoder.pos_embed.dtype
    )  # bfloat16 could not tell neighbouring grey values apart
    hidden = encoder.patch_embed(pixels) + encoder.pos_embed
    levels = []
    for block in encoder.blocks:
        hidden = block(hidden)
        if block.window_size == 0:
            levels.append(hidden)
    return levels


def normalise_pixels(images: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to Segment Anything's normalised pixels."""
    mean = torch.tensor(PIXEL_MEAN, dtype=images.dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, dtype=images.dtype, device=images.device).view(3, 1, 1)
    return ((images + 1) * 127.5 - mean) / std


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    """All weights of a directory or an official checkpoint; the latter is read without unpickling code."""
    file = find_file(str(path), ["model.safetensors"])
    if path.is_dir():
        load_part(str(path), "config.json", lambda: check_json(path / "config.json"))
    return read_weights(file)


def _build(state: Mapping[str, torch.Tensor], image_size: int) -> ImageEncoderViT:
    """An encoder whose widths, depth, heads, windows and global blocks are those of the weights."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(m.group(1)) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))
    spans = [state[f"blocks.{i}.attn.rel_pos_h"].shape[0] for i in range(depth)]
    full = 2 * state["pos_embed"].shape[1] - 1
    windows = {(span + 1) // 2 for span in spans if span != full}
    if len(windows) > 1:
        raise ValueError(f"the encoder has windows of several sizes ({sorted(windows)}): not a Segment Anything model")
    return ImageEncoderViT(
        img_size=image_size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=width // state["blocks.0.attn.rel_pos_h"].shape[1],
        mlp_ratio=state["blocks.0.mlp.lin1.weight"].shape[0] / width,
        out_chans=state["neck.0.weight"].shape[0],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=windows.pop() if windows else 0,
        global_attn_indexes=tuple(i for i, span in enumerate(spans) if span == full),
    )


def _resize_tables(state: Mapping[str, torch.Tensor], grid: int, encoder: ImageEncoderViT) -> dict[str, torch.Tensor]:
    """Position tables for a `grid` x `grid` token map; windowed blocks keep theirs, as windows do not grow."""
    resized = dict(state)
    absolute = state["pos_embed"]
    if absolute.shape[1] != grid:
        channels_first = absolute.permute(0, 3, 1, 2)
        table = F.interpolate(channels_first, size=(grid, grid), mode="bicubic", align_corners=False)
        resized["pos_embed"] = table.permute(0, 2, 3, 1)
    for number, block in enumerate(encoder.blocks):
        if block.window_size != 0:
            continue
        for axis in ("h", "w"):
            name = f"blocks.{number}.attn.rel_pos_{axis}"
            table = state[name]
            if table.shape[0] != 2 * grid - 1:
                longer = F.interpolate(table.T[None], size=2 * grid - 1, mode="linear", align_corners=False)
                resized[name] = longer[0].T.contiguous()
    return resized
