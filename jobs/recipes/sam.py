"""Tiny Segment Anything: the real modules at small size, trained on the scenes' masks from point prompts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn
from torch.nn import functional as F

from flashdmd_ray.demo.scenes import CANVAS, make_pool
from flashdmd_ray.models.sam import PIXEL_MEAN, PIXEL_STD, normalise_pixels
from recipes.training import Plan, fit

PLAN = Plan(steps=1200, learning_rate=1e-3, seed=51)
BATCH = 12
POINTS = 4  # per image: its encoding is shared
_POOL = 12_000
_CONFIG: dict[str, Any] = {
    "image_size": CANVAS,
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "window_size": 6,
    "global_attn_indexes": [1, 3],
    "prompt_dim": 32,
    "mask_resolution": 48,
}


def build() -> Sam:
    """`Sam` whose images are 24x24 and whose masks are 48x48 (four times the 12x12 token grid)."""
    grid = _CONFIG["image_size"] // _CONFIG["patch_size"]
    width = _CONFIG["prompt_dim"]
    encoder = ImageEncoderViT(
        img_size=_CONFIG["image_size"],
        patch_size=_CONFIG["patch_size"],
        embed_dim=_CONFIG["embed_dim"],
        depth=_CONFIG["depth"],
        num_heads=_CONFIG["num_heads"],
        mlp_ratio=4,
        out_chans=width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=_CONFIG["window_size"],
        global_attn_indexes=_CONFIG["global_attn_indexes"],
    )
    prompts = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(grid, grid),
        input_image_size=(_CONFIG["image_size"],) * 2,
        mask_in_chans=8,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=64, num_heads=4),
        transformer_dim=width,
        iou_head_depth=2,
        iou_head_hidden_dim=32,
    )
    return Sam(encoder, prompts, decoder, pixel_mean=list(PIXEL_MEAN), pixel_std=list(PIXEL_STD))


def predict(sam: Sam, images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Mask logits (B, K, 48, 48) for K single foreground points (B, K, 2), in pixels (x, y), on images (B, 3, 24, 24).

    The decoder takes one image and many prompts at a time, as the official one does.
    """
    embeddings = sam.image_encoder(normalise_pixels(images))
    labels = torch.ones(points.shape[1], 1)
    masks = []
    for embedding, coordinates in zip(embeddings, points, strict=True):
        sparse, dense = sam.prompt_encoder(points=(coordinates[:, None], labels), boxes=None, masks=None)
        mask, _ = sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks.append(mask[:, 0])
    return torch.stack(masks)


def draw_points(masks: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random points (x, y) on digits of each scene, (B, count, 2) float32, with their masks (B, count, H, W).

    `masks` (B, 2, H, W) bool, the first never empty.
    """
    two = masks[:, 1].flatten(1).any(1)
    second = two[:, None] & (torch.rand(len(masks), count, generator=generator) < 0.5)
    picked = masks[torch.arange(len(masks))[:, None], second.long()]
    place = torch.multinomial(picked.flatten(0, 1).flatten(1).float(), 1, generator=generator).view(second.shape)
    points = torch.stack([place % masks.shape[-1], place // masks.shape[-1]], dim=-1).float()
    return points, picked


def mask_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy plus dice of (B, K, 48, 48) logits against (B, K, 24, 24) masks."""
    logits = F.avg_pool2d(logits, 2)
    target = target.float()
    probability = logits.sigmoid()
    overlap = (probability * target).sum(dim=(2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum(dim=(2, 3)) + target.sum(dim=(2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + dice.mean()


def train(work: Path, plan: Plan = PLAN) -> tuple[Sam, dict[str, float]]:
    torch.manual_seed(plan.seed)
    sam = build()
    pool = make_pool(_POOL, "train", plan.seed)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        points, target = draw_points(pool.masks[index], POINTS, generator)
        images = pool.batch(index)
        images = images + 0.05 * torch.randn(images.shape, generator=generator)
        return mask_loss(predict(sam, images, points), target)

    seconds = fit("sam", sam, loss_of, plan, work)
    return sam.eval(), {"seconds": seconds, "held_out_iou": evaluate(sam), "count": 500}


@torch.no_grad()
def evaluate(sam: Sam, count: int = 500) -> float:
    """Mean intersection over union on held-out scenes, one random point each."""
    pool = make_pool(count, "held_out", 5252)
    points, target = draw_points(pool.masks, 1, torch.Generator().manual_seed(1))
    logits = predict(sam, pool.batch(torch.arange(count)), points)
    mask = F.avg_pool2d(logits, 2) > 0
    overlap = (mask & target).sum(dim=(2, 3)) / (mask | target).sum(dim=(2, 3))
    return float(overlap.mean())


def save(sam: Sam, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in sam.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")


def load(path: Path) -> Sam:
    """The whole model, float32, in eval mode."""
    sam = build()
    sam.load_state_dict({name: value.float() for name, value in load_file(path / "model.safetensors").items()})
    return sam.eval()
