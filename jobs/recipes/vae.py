"""VAE: 24x24 RGB to 12x12x3 latents, one downsampling, with normalised latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from flashdmd_ray.demo.scenes import make_pool
from recipes.training import Plan, fit

PLAN = Plan(steps=1800, learning_rate=2e-3, ema_decay=0.995, seed=11)
BATCH = 64
LATENT_CHANNELS = 3  # of four, training pruned one: its posterior was the prior
_POOL = 20_000
_KL_WEIGHT = 1e-3
_LATENT_NOISE = 0.1  # decoding tolerates small errors of a generator


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=24,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def train(work: Path, plan: Plan = PLAN) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train on train-split scenes; returns the VAE and its measured figures on held-out scenes."""
    torch.manual_seed(plan.seed)
    vae = build().to(memory_format=torch.channels_last)
    pool = make_pool(_POOL, "train", plan.seed)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        images = pool.batch(torch.randint(_POOL, (BATCH,), generator=generator))
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        spread = posterior.mean.detach().std()
        latents = latents + _LATENT_NOISE * spread * torch.randn(latents.shape, generator=generator)
        output = vae.decode(latents).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(output, images) + F.mse_loss(output, images) + _KL_WEIGHT * kl

    seconds = fit("vae", vae, loss_of, plan, work)
    normalise_latents(vae, pool.batch(torch.arange(4096)))
    held_out = make_pool(1000, "held_out", plan.seed).batch(torch.arange(1000))
    with torch.no_grad():
        error = F.mse_loss(vae.decode(vae.encode(held_out).latent_dist.mode()).sample.clamp(-1, 1), held_out)
    return vae, {"seconds": seconds, "held_out_psnr_db": float(10 * torch.log10(4 / error))}


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the affine map that gives each latent channel mean 0 and deviation 1 into the two 1x1 convolutions.

    With it a scaling_factor of 1 is right and no code downstream has to know means. `images` (B, 3, 24, 24).
    """
    mode = vae.encode(images).latent_dist.mode()
    mean, std = mode.mean(dim=(0, 2, 3)), mode.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log-variances of the scaled latents
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= std[None, :, None, None]
