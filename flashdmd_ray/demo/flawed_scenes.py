"""Losers for preference training: scenes that contradict the caption, and pictures that are badly drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional as F

from flashdmd_ray.batch import to_uint8
from flashdmd_ray.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    Pool,
    SceneAttributes,
    Split,
    parse_caption,
    place,
    render,
)

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def contradict(attributes: SceneAttributes, rng: np.random.Generator) -> SceneAttributes:
    """The same scene with one fact changed: a digit, a colour, the background, the relation, or colours swapped."""
    kind = rng.choice(["digit", "digit", "digit", "colour", "colour", "background", "relation", "swap"])
    digits = list(attributes.digits)
    slot = int(rng.integers(len(digits)))
    item = digits[slot]
    if kind == "background":
        return replace(attributes, background=str(rng.choice([b for b in BACKGROUNDS if b != attributes.background])))
    if kind == "colour":
        digits[slot] = replace(item, colour=str(rng.choice([c for c in COLOURS if c != item.colour])))
        return replace(attributes, digits=tuple(digits))
    if attributes.relation is not None and kind == "relation":
        other = [r for r in RELATIONS if r != attributes.relation]
        same_things = digits[0] == digits[1]
        other = [r for r in other if not (same_things and r == _OPPOSITE[attributes.relation])]
        return replace(attributes, relation=str(rng.choice(other)))
    if attributes.relation is not None and kind == "swap" and digits[0].colour != digits[1].colour:
        swapped = (replace(digits[0], colour=digits[1].colour), replace(digits[1], colour=digits[0].colour))
        if digits[0].digit != digits[1].digit:
            return replace(attributes, digits=swapped)
    digits[slot] = replace(item, digit=int(rng.choice([d for d in range(10) if d != item.digit])))
    return replace(attributes, digits=tuple(digits))


def contradicting_pool(pool: Pool, seed: int, split: Split = "train") -> Pool:
    """For each scene of a pool one freshly drawn scene that contradicts its caption in one fact."""
    rng = np.random.default_rng((seed, 77))
    attributes = [contradict(parse_caption(caption), rng) for caption in pool.captions]
    images, masks = render([place(item, split, rng) for item in attributes])
    return Pool(to_uint8(images), masks, [item.caption for item in attributes])


def degrade(images: torch.Tensor, others: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Badly drawn versions of images (B, 3, H, W) in [-1, 1]: blurred, blended with `others`, noisy, pale or torn."""
    count = len(images)
    kind = torch.randint(5, (count, 1, 1, 1), generator=generator)
    strength = 0.2 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    mean = images.mean(dim=(2, 3), keepdim=True)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(F.avg_pool2d(images, 3), size=images.shape[-2:], mode="bilinear")
    soft = torch.where(strength > 0.5, coarse, blurred)
    blended = images.lerp(others, 0.5 * strength)
    noisy = images + 0.8 * strength * torch.randn(images.shape, generator=generator)
    pale = images.lerp(mean, strength)
    holes = F.interpolate(torch.rand(count, 1, 8, 8, generator=generator), size=images.shape[-2:]) < 0.4 * strength
    torn = torch.where(holes, mean, images)
    result = images
    for number, version in enumerate((soft, blended, noisy, pale, torn)):
        result = torch.where(kind == number, version, result)
    return result.clamp(-1, 1)
