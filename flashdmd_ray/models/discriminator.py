"""The pixel discriminator D_omega: small trained heads on the features of a frozen Segment Anything image encoder."""

from __future__ import annotations

import math
from typing import Self

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from flashdmd_ray.models.sam import global_attention_tokens


class Recomputed(nn.Module):
    """A transformer block whose activations are recomputed in the backward pass instead of kept."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.window_size = block.window_size

    def forward(self, tokens: Tensor) -> Tensor:
        return checkpoint(self.block, tokens, use_reentrant=False)


class SamFeatures(nn.Module):
    """Tokens of a frozen SAM image encoder after each block with global attention.

    Gradients flow through it to the pixels.
    """

    def __init__(self, encoder: ImageEncoderViT, gradient_checkpointing: bool = False) -> None:
        """Take the blocks of `encoder` up to its last level.

        gradient_checkpointing: recompute each block in the backward pass; at 1024 pixels they dominate memory.
        """
        super().__init__()
        self.levels = [index for index, block in enumerate(encoder.blocks) if block.window_size == 0]
        assert self.levels, "a SAM encoder has blocks with global attention"
        # What comes after the last level is never looked at.
        blocks = list(encoder.blocks)[: self.levels[-1] + 1]
        encoder.blocks = (
            nn.ModuleList(Recomputed(block) for block in blocks) if gradient_checkpointing else nn.ModuleList(blocks)
        )
        self.encoder = encoder.requires_grad_(False).eval()
        self.width = int(encoder.patch_embed.proj.out_channels)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """One tensor (B, width, H', W') per level, shallow to deep, of `images` float (B, 3, H, W) in [-1, 1]."""
        size = int(self.encoder.img_size)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return [level.permute(0, 3, 1, 2) for level in global_attention_tokens(self.encoder, images)]


class Head(nn.Module):
    """One logit per position of a feature map.

    Two convolutions with spectral norm, group norm and LeakyReLU, then a read-out. With a prompt embedding p the
    logit is  read_out(h) + <V p, h> / sqrt(hidden)  (projection discriminator).
    """

    def __init__(self, width: int, hidden: int, prompt_width: int | None) -> None:
        super().__init__()
        # At least four channels to a group: one channel alone would lose its mean over the image, and with it all
        # that is global.
        groups = math.gcd(8, hidden, max(1, hidden // 4))
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(width, hidden, 1)),
            nn.GroupNorm(groups, hidden),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
            nn.GroupNorm(groups, hidden),
            nn.LeakyReLU(0.2),
        )
        self.read_out = spectral_norm(nn.Conv2d(hidden, 1, 1))
        self.project = None if prompt_width is None else spectral_norm(nn.Linear(prompt_width, hidden, bias=False))

    def forward(self, features: Tensor, prompts: Tensor | None) -> Tensor:
        """Logits (B, H'*W') of `features` (B, width, H', W').

        prompts: embeddings (B, prompt_width), for heads that project on them.
        """
        hidden = self.body(features)
        logits = self.read_out(hidden)[:, 0]
        if self.project is not None:
            assert prompts is not None, "this discriminator projects on the prompt embedding"
            direction = self.project(prompts) / math.sqrt(hidden.shape[1])
            logits = logits + torch.einsum("bchw,bc->bhw", hidden, direction)
        return logits.flatten(1)


class PixelDiscriminator(nn.Module):
    """Discriminator on pixels, one head per global-attention level of SAM.

    Only the heads are trained. Spectral norm keeps its power-iteration vectors in buffers, which belong to a
    checkpoint: they move at every forward in training mode.
    """

    def __init__(
        self,
        encoder: ImageEncoderViT,
        hidden: int = 32,
        prompt_width: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Put untrained heads on `encoder`.

        prompt_width: size of the prompt embedding that heads are projected on; None judges images alone.
        """
        super().__init__()
        self.features = SamFeatures(encoder, gradient_checkpointing)
        self.heads = nn.ModuleList(Head(self.features.width, hidden, prompt_width) for _ in self.features.levels)

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Logits float32 (B, N) of `images` float (B, 3, H, W) in [-1, 1]; N = levels x positions, positive means real."""
        levels = self.features(images)
        logits = [head(level.float(), prompts) for head, level in zip(self.heads, levels, strict=True)]
        return torch.cat(logits, dim=1)
