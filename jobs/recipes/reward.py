"""Preference reward: a tiny CLIPModel in PickScore's format, trained contrastively and on preference pairs.

Its towers are its own: other seeds, other widths and other training than the teacher's text towers. The winner of a
pair is a real scene; the loser contradicts the caption in one fact or is badly drawn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionConfig

from flashdmd_ray.demo.flawed_scenes import contradicting_pool, degrade
from flashdmd_ray.demo.scenes import CANVAS, Pool, make_pool, parse_caption
from recipes.text import (
    ATTRIBUTE_SIZES,
    attribute_labels,
    declare_float32,
    readout_loss,
    text_config,
    tokenize,
)
from recipes.training import Plan, fit

PLAN = Plan(steps=3000, learning_rate=1.5e-3, warmup=200, ema_decay=0.998, seed=61)
BATCH = 64
_POOL = 30_000
_WIDTH = 64


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=4,
        projection_dim=_WIDTH,
        hidden_act="gelu",
    )
    text = text_config(tokenizer, 64, 2, _WIDTH)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=_WIDTH))


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": CANVAS, "width": CANVAS}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": CANVAS}, crop_size=size), tokenizer)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Map pixels in [-1, 1] to CLIP's normalised ones, as the processor does with images of the right size."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return ((images + 1) / 2 - mean) / std


class _Trainee(nn.Module):
    """The model and a linear read-out of attributes from both embeddings, which training drops at the end.

    Without the read-out the image tower takes many times longer to tell digits apart.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.readout = nn.Linear(_WIDTH, sum(ATTRIBUTE_SIZES))


def train(work: Path, tokenizer: CLIPTokenizer, plan: Plan = PLAN) -> tuple[CLIPModel, dict[str, float]]:
    """Train the reward; return it and the share of held-out pairs that it orders right."""
    torch.manual_seed(plan.seed)
    model = _Trainee(build(tokenizer))
    pool = make_pool(_POOL, "train", plan.seed)
    wrong = contradicting_pool(pool, plan.seed)
    ids, wrong_ids = tokenize(tokenizer, pool.captions), tokenize(tokenizer, wrong.captions)
    labels = attribute_labels([parse_caption(c) for c in pool.captions])

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        good, bad = pool.batch(index), wrong.batch(index)
        poor = degrade(good, good.roll(1, 0), generator)
        good = good + 0.04 * torch.randn(good.shape, generator=generator)
        text_ids = torch.cat([ids[index], wrong_ids[index]])
        output = model.clip(input_ids=text_ids, pixel_values=normalise(torch.cat([good, bad, poor])))
        text, image = output.text_embeds, output.image_embeds
        scale = model.clip.logit_scale.exp().clamp(max=100)
        logits = scale * image[: 2 * BATCH] @ text.T
        target = torch.arange(2 * BATCH)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        scores = scale * (image.view(3, BATCH, -1) * text[:BATCH]).sum(-1)
        pairs = F.softplus(scores[1] - scores[0]).mean() + F.softplus(scores[2] - scores[0]).mean()
        readout = readout_loss(model.readout(image[:BATCH] * 8), labels[index])
        readout = readout + readout_loss(model.readout(text[:BATCH] * 8), labels[index])
        return contrastive + pairs + 0.5 * readout

    seconds = fit("reward", model, loss_of, plan, work)
    return model.clip.eval(), {"seconds": seconds, **evaluate(model.clip.eval(), tokenizer)}


def score(clip: CLIPModel, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """PickScore (B,) of images (B, 3, 24, 24) in [-1, 1]: exp(logit_scale) times the cosine."""
    output = clip(input_ids=ids, pixel_values=normalise(images))
    return clip.logit_scale.exp() * (output.image_embeds * output.text_embeds).sum(-1)


@torch.no_grad()
def evaluate(clip: CLIPModel, tokenizer: CLIPTokenizer, count: int = 2000) -> dict[str, float]:
    """Shares of held-out pairs in which the real scene scores higher than a contradicting or a badly drawn one."""
    pool = make_pool(count, "held_out", 6262)
    wrong: Pool = contradicting_pool(pool, 6262, "held_out")
    everything = torch.arange(count)
    good = pool.batch(everything)
    poor = degrade(good, good.roll(1, 0), torch.Generator().manual_seed(6262))
    ids = tokenize(tokenizer, pool.captions)
    best = score(clip, ids, good)
    return {
        "beats_contradicting": float((best > score(clip, ids, wrong.batch(everything))).float().mean()),
        "beats_badly_drawn": float((best > score(clip, ids, poor)).float().mean()),
        "mean_score": float(best.mean()),
        "count": count,
    }


def save(clip: CLIPModel, tokenizer: CLIPTokenizer, path: Path) -> None:
    """Write a directory that `CLIPModel` and `CLIPProcessor` load, with weights in half precision."""
    clip.half().save_pretrained(path)
    clip.float()
    declare_float32(path / "config.json")
    build_processor(tokenizer).save_pretrained(path)
