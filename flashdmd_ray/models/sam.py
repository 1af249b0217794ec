"""Segment Anything's image encoder as a frozen feature extractor, at any image size.

The official encoder accepts exactly one image size. Here its absolute and relative position tables are interpolated
once, at loading, so that a discriminator can read the size that the generator makes.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT
from torch import nn
from torch.nn import functional as F

# The mean and deviation of pixels in 0..255 that Segment Anything was trained with.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)

_PREFIX = "image_encoder."


def load_sam_encoder(path: Path | str, image_size: int) -> ImageEncoderViT:
    """The frozen encoder in eval mode for square images of `image_size` pixels, float32.

    `path` is a directory with `config.json` and `model.safetensors` (the keys of `segment_anything.Sam`), or an
    official checkpoint such as `sam_vit_b_01ec64.pth`. The architecture follows from the shapes of the weights.
    Raises ValueError when the file is missing or no SAM checkpoint, or when the patch size does not divide
    `image_size`.
    """
    path = Path(path)
    state = _read_state(path)
    encoder_state = {k.removeprefix(_PREFIX): v.float() for k, v in state.items() if k.startswith(_PREFIX)}
    if "pos_embed" not in encoder_state or "patch_embed.proj.weight" not in encoder_state:
        raise ValueError(f"{path} is not a Segment Anything checkpoint: no image encoder in it")
    patch = encoder_state["patch_embed.proj.weight"].shape[-1]
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size {image_size} is not a positive multiple of the encoder's patch size {patch}")
    encoder = _build(encoder_state, image_size)
    encoder.load_state_dict(_resize_tables(encoder_state, image_size // patch, encoder))
    return encoder.eval().requires_grad_(False)


def global_attention_tokens(encoder: ImageEncoderViT, images: torch.Tensor) -> list[torch.Tensor]:
    """Tokens (B, H/p, W/p, C) after each global-attention block, shallow to deep.

    `images` (B, 3, H, W) floating in [-1, 1], H = W = the size the encoder was loaded for (else ValueError).
    Gradients flow to the images.
    """
    if images.shape[-2:] != (encoder.img_size, encoder.img_size):
        raise ValueError(f"images are {tuple(images.shape[-2:])}, the encoder was loaded for {encoder.img_size}")
    hidden = encoder.patch_embed(normalise_pixels(images)) + encoder.pos_embed
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
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is missing: give a SAM directory or an official sam_vit_*.pth checkpoint")
    try:
        if path.is_dir():
            json.loads((path / "config.json").read_text())
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, json.JSONDecodeError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a Segment Anything checkpoint: {error}") from error


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
