"""Prompt checker: a digit classifier on measured crops and a scene encoder for features, both from train-split scenes only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from flashdmd_ray.demo.checker import (
    CROP,
    DigitClassifier,
    PromptChecker,
    SceneEncoder,
    expected_parts,
    measure,
)
from flashdmd_ray.demo.scenes import Pool, make_pool, parse_caption
from recipes.text import ATTRIBUTE_SIZES, attribute_labels, readout_loss
from recipes.training import Plan, fit

PLAN = Plan(steps=1500, learning_rate=2e-3, seed=41)
_SCENE_STEPS = 4  # times as many for the scene encoder, which learns layout, colours and two digits at once
BATCH = 128
_POOL = 16_000


def _crops(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digit crops (N, 14, 14) of the scenes whose layout was measured right, with labels (N,)."""
    crops: list[torch.Tensor] = []
    labels: list[int] = []
    for index in torch.arange(len(pool.captions)).split(1024):
        measured = measure(pool.batch(index))
        for row, number in enumerate(index.tolist()):
            layout, parts = expected_parts(parse_caption(pool.captions[number]))
            if measured.layout[row] == layout:
                crops.extend(measured.crops[row, : len(parts)])
                labels.extend(digit for digit, _ in parts)
    return torch.stack(crops), torch.tensor(labels)


def _distort(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, scale, shear and noise, so that strokes of a generator are judged by their shape. (N, 14, 14) in and out."""
    count = len(crops)
    theta = torch.eye(2, 3).repeat(count, 1, 1)
    theta[:, :, :2] += 0.12 * torch.randn(count, 2, 2, generator=generator)
    theta[:, :, 2] += 0.06 * torch.randn(count, 2, generator=generator)
    grid = F.affine_grid(theta, [count, 1, CROP, CROP], align_corners=False)
    distorted = F.grid_sample(crops[:, None], grid, align_corners=False)
    strength = 0.15 * torch.rand(count, 1, 1, 1, generator=generator)
    return (distorted + strength * torch.randn(distorted.shape, generator=generator)).clamp(0, 1)


def train(work: Path, plan: Plan = PLAN) -> tuple[PromptChecker, dict[str, float]]:
    """Train the checker; return it and its prompt accuracy on real held-out scenes."""
    torch.manual_seed(plan.seed)
    pool = make_pool(_POOL, "train", plan.seed)
    crops, labels = _crops(pool)
    digits, encoder = DigitClassifier(), SceneEncoder(sum(ATTRIBUTE_SIZES))
    targets = attribute_labels([parse_caption(c) for c in pool.captions])

    def digit_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(crops), (BATCH,), generator=generator)
        return F.cross_entropy(digits(_distort(crops[index], generator)), labels[index], label_smoothing=0.05)

    def scene_loss(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        images = pool.batch(index)
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        return readout_loss(encoder.head(encoder(images)), targets[index])

    seconds = fit("checker_digits", digits, digit_loss, plan, work)
    seconds += fit("checker_scenes", encoder, scene_loss, replace(plan, steps=_SCENE_STEPS * plan.steps), work)
    checker = PromptChecker(digits, encoder)
    return checker, {"seconds": seconds, "scene_encoder_steps": _SCENE_STEPS * plan.steps, **evaluate(checker)}


def evaluate(checker: PromptChecker, count: int = 4000) -> dict[str, float]:
    """Prompt accuracy on real held-out scenes, and how often the checker accepts the caption of another scene."""
    pool = make_pool(count, "held_out", 4242)
    images = pool.batch(torch.arange(count))
    wrong = pool.captions[1:] + pool.captions[:1]
    different = torch.tensor([a != b for a, b in zip(pool.captions, wrong, strict=True)])
    return {
        "held_out_accuracy": float(checker.correct(images, pool.captions).float().mean()),
        "accepts_wrong_caption": float(checker.correct(images, wrong)[different].float().mean()),
        "count": count,
    }


def save(checker: PromptChecker, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    holder = nn.ModuleDict({"digits": checker.digits, "encoder": checker.encoder})
    save_file(
        {name: value.half().contiguous() for name, value in holder.state_dict().items()}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"attribute_count": sum(ATTRIBUTE_SIZES)}) + "\n")
