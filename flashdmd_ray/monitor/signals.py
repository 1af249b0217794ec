"""Signals of candidates and of how their rewards agree: pure functions, one number each for some prompt groups.

A reward that is hacked shows in the images long before anybody looks at them: they darken or glare, lose their edges or colours, and the
candidates of a prompt become alike; or rewards that agreed stop agreeing. None of these numbers means anything alone, because training is
meant to change images: `rules` compares them with the run's own beginning.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from flashdmd_ray.monitor.agreement import agreement
from flashdmd_ray.monitor.watch import PREFIX

LARGEST = 256
"""Longer side, in pixels, at which images are looked at: statistics of larger ones would cost time and say the same."""
ALIKE = 32
"""The same for how much images differ: what two images show, not how sharp they are."""
DARK, BRIGHT = 0.1, 0.9
"""Luminance below and above which a pixel is dark or bright; black is 0, white 1."""
EDGE = 0.1
"""Difference of luminance between a pixel and its right or lower neighbour above which it lies on an edge."""
LEVELS = 4
"""Of each colour channel in the histogram of `colour_entropy`."""
LUMINANCE = (0.2126, 0.7152, 0.0722)


def probe_signals(images: Tensor, rewards: Mapping[str, Tensor], latent: Collection[str] = ()) -> dict[str, float]:
    """All of the below as metrics of a step."""
    return {
        f"{PREFIX}{name}": value for name, value in (image_signals(images) | reward_signals(rewards, latent)).items()
    }


def image_signals(images: Tensor) -> dict[str, float]:
    """Means over all candidates, by name. images: uint8 (B, K, 3, H, W), K >= 1."""
    pixels = reduced(images.flatten(0, 1), LARGEST)
    light = luminance(pixels)
    small = reduced(images.flatten(0, 1), ALIKE).unflatten(0, images.shape[:2])
    return {
        "dark_share": (light < DARK).float().mean().item(),
        "bright_share": (light > BRIGHT).float().mean().item(),
        "luminance": light.mean().item(),
        "saturation": (pixels.amax(dim=1) - pixels.amin(dim=1)).mean().item(),
        "edge_density": edge_density(light),
        "colour_entropy": colour_entropy(pixels),
        "group_diversity": mean_distance(small),
        "prompt_diversity": mean_distance(small.transpose(0, 1)),
    }


def reduced(images: Tensor, longest: int) -> Tensor:
    """Pixels float32 (N, 3, h, w) in [0, 1] of uint8 images (N, 3, H, W), averaged over whole blocks of pixels so that neither side is
    longer than `longest`."""
    block = -(-max(images.shape[-2:]) // longest)
    pixels = images.float() / 255
    return pixels if block == 1 else F.avg_pool2d(pixels, block, ceil_mode=True, count_include_pad=False)


def luminance(pixels: Tensor) -> Tensor:
    """Luminance of pixels (N, 3, h, w), by the weights of ITU-R BT.709; (N, h, w)."""
    return torch.einsum("nchw,c->nhw", pixels, torch.tensor(LUMINANCE, device=pixels.device))


def edge_density(light: Tensor) -> float:
    """Share of pixels of (N, h, w) that differ by more than EDGE from their right or lower neighbour."""
    right = light[:, :-1, 1:] - light[:, :-1, :-1]
    below = light[:, 1:, :-1] - light[:, :-1, :-1]
    return (torch.maximum(right.abs(), below.abs()) > EDGE).float().mean().item()


def colour_entropy(pixels: Tensor) -> float:
    """Entropy in bits of an image's colours, LEVELS per channel, mean over images (N, 3, h, w): 0 for one colour, at most 6."""
    levels = (pixels * LEVELS).long().clamp(max=LEVELS - 1)
    codes = (levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2]
    counts = F.one_hot(codes.flatten(1), LEVELS**3).float().mean(dim=1)
    return torch.special.entr(counts).sum(dim=1).mean().item() / torch.log(torch.tensor(2.0)).item()


def mean_distance(images: Tensor) -> float:
    """Root mean square difference between two images of a group, mean over the pairs of a group and over groups; images (G, N, 3, h, w)
    with N >= 2, 0 for N = 1."""
    flat = images.flatten(2)
    count = flat.shape[1]
    if count < 2:
        return 0.0
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[2] ** 0.5
    return (distances.sum(dim=(1, 2)) / (count * (count - 1))).mean().item()


def reward_signals(rewards: Mapping[str, Tensor], latent: Collection[str] = ()) -> dict[str, float]:
    """Level, spread and agreement of the rewards.

    rewards: label -> (B, K), not finite where one failed. latent: the labels of latent rewards.
    reward/<label>, spread/<label>: mean and standard deviation over all candidates. disagreement: 1 minus the mean rank correlation of two
    rewards within a prompt group, over groups and pairs of rewards; 0 when all order alike, 1 when they are unrelated, 2 when they are
    opposed (GARDO's sign of a reward that is being hacked). latent_correlation: that rank correlation over pairs of a latent and another
    reward. What cannot be said is absent.
    """
    found: dict[str, float] = {}
    for label, values in rewards.items():
        finite = values[values.isfinite()].double()
        if len(finite) > 1:
            found |= {f"reward/{label}": finite.mean().item(), f"spread/{label}": finite.std(correction=0).item()}
    pairs = {pair: agreement(rewards[pair[0]], rewards[pair[1]]) for pair in itertools.combinations(rewards, 2)}
    known = {pair: both.correlation for pair, both in pairs.items() if both is not None}
    mixed = [value for (one, two), value in known.items() if (one in latent) != (two in latent)]
    if known:
        found["disagreement"] = 1 - sum(known.values()) / len(known)
    if mixed:
        found["latent_correlation"] = sum(mixed) / len(mixed)
    return found
