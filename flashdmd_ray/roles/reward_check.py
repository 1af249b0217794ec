"""A reward is tried before it may steer a training: on one image that everybody knows, and on the same image destroyed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flashdmd_ray.batch import from_uint8, noise, to_uint8
from flashdmd_ray.config import Config, RewardConfig
from flashdmd_ray.diffusion.sampling import timesteps_like
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.rewards import PixelReward
from flashdmd_ray.roles.networks import load_parts
from flashdmd_ray.run.messages import typed_line

PROMPT = "a red 0 on a gray background"
SIDE = 224
"""Pixels, for rewards of images: what most of them look at."""
RESOLVED = 1e-4
"""A difference of rewards below this share of their size is rounding."""


class Probe(NamedTuple):
    """images: float32 (2, 3, H, W) in [-1, 1], of 8 bits each: the known image, then its pixels in random order."""

    images: Tensor
    texts: list[str]


def known_image(height: int, width: int) -> Probe:
    """A red ring on gray, drawn with soft edges."""
    y = torch.linspace(-1, 1, height)[:, None]
    x = torch.linspace(-1, 1, width)[None, :] * (width / height)
    distance = ((x / 0.45).square() + (y / 0.7).square()).sqrt()  # from the centre, 1 on the ring's middle line
    ink = ((0.22 - (distance - 0.85).abs()) * 12).clamp(0, 1)
    red, gray = torch.tensor([0.8, -0.76, -0.76]), torch.tensor([-0.24, -0.24, -0.24])
    image = gray[:, None, None] + ink * (red - gray)[:, None, None]
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
    destroyed = image.flatten(1)[:, order].view_as(image)
    return Probe(from_uint8(to_uint8(torch.stack([image, destroyed]))), [PROMPT] * 2)


@torch.no_grad()
def check_rewards(
    config: Config, models: dict[str, PixelReward | NoisyLatentReward], device: torch.device, family: Family | None
) -> None:
    """Raises ValueError, one line, for the first reward that cannot score the known image or prefers the destroyed one."""
    for reward in config.rewards:
        model = models[reward.label]
        if isinstance(model, NoisyLatentReward):
            assert family is not None, "latent rewards come with their family"
            latents, texts = _latents(config, family)
            timesteps = timesteps_like(config.sampling.timesteps[-1], latents)
            score = _latent_score(model, latents, timesteps, texts, family)
        else:
            images, texts = known_image(SIDE, SIDE)
            score = _pixel_score(model, images.to(device), texts)
        judge(reward, score)


def judge(reward: RewardConfig, score: Callable[[], Tensor]) -> None:
    """See `check_rewards`. score() -> (2,): rewards of the known image and of the destroyed one."""
    where = f"rewards: '{reward.label}' ({reward.kind}, {reward.path})"
    try:
        good, destroyed = score().tolist()
    except Exception as error:
        raise ValueError(f"{where} cannot score a known image: {typed_line(error)}") from error
    if not torch.tensor([good, destroyed]).isfinite().all():
        raise ValueError(
            f"{where} gives {good:g} for a known image and {destroyed:g} for noise; a reward must be finite"
        )
    if reward.skip_noise_check is None and destroyed - good > RESOLVED * max(abs(good), abs(destroyed)):
        raise ValueError(
            f"{where} prefers noise ({destroyed:.4g}) to an image of its prompt ({good:.4g}): training towards it would destroy them. "
            "Check its files and formula, or say in its setting `skip_noise_check` why that is right"
        )


def _pixel_score(model: PixelReward, images: Tensor, texts: list[str]) -> Callable[[], Tensor]:
    return lambda: model.score(images, texts)


def _latent_score(
    model: NoisyLatentReward, latents: Tensor, timesteps: Tensor, texts: list[str], family: Family
) -> Callable[[], Tensor]:
    return lambda: model.score(latents, timesteps, texts, family)


def _latents(config: Config, family: Family) -> tuple[Tensor, list[str]]:
    """Both images as latents at the last denoising timestep, with the same noise. The VAE is loaded for this alone."""
    images, texts = known_image(*family.image_size)
    vae = load_parts(config.model, ("vae",)).to(family.device)
    clean = torch.cat([vae.encode_images(image[None]) for image in images])
    same = noise(torch.zeros(1, dtype=torch.long, device=clean.device), clean.shape[1:], 0, "known image")
    timesteps = timesteps_like(config.sampling.timesteps[-1], clean)
    return family.schedule.add_noise(clean, same.expand_as(clean), timesteps), texts
