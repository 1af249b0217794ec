"""What every diffusion or flow network looks like to the rest of the code: noisy latents, timesteps and conditioning
in, prediction out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told about each sample.

    prompt_embeds: float (B, L, D), one vector per token.
    pooled: float (B, P), one vector per prompt.
    time_ids: float (B, 6), SDXL's micro-conditioning (original height and width, crop top and left, target height and
    width), pixels.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Rows chosen by a slice, an int64 tensor or a bool mask; the batch dimension stays."""
        return Conditioning(self.prompt_embeds[index], self.pooled[index], self.time_ids[index])

    def index_select(self, indices: Tensor) -> Conditioning:
        """Rows at int64 `indices` (N,)."""
        return self[indices.to(self.prompt_embeds.device)]

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Each row `repeats` times in a row: the order of candidates (B, K, ...) flattened to (B*K, ...)."""
        return Conditioning(
            self.prompt_embeds.repeat_interleave(repeats, 0),
            self.pooled.repeat_interleave(repeats, 0),
            self.time_ids.repeat_interleave(repeats, 0),
        )

    def to(self, device: torch.device | str) -> Conditioning:
        return Conditioning(self.prompt_embeds.to(device), self.pooled.to(device), self.time_ids.to(device))

    @classmethod
    def concat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        return cls(
            torch.cat([part.prompt_embeds for part in parts]),
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.time_ids for part in parts]),
        )


class Denoiser(nn.Module):
    """Base of the networks that predict noise, velocity or flow from noisy latents.

    A subclass wraps one stock network. Schedules, not denoisers, convert predictions: `forward` answers in the
    network's own parameterisation.
    """

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction, float32 (B, C, h, w), for `noisy` float (B, C, h, w) at `timesteps` int64 or float (B,).

        Timesteps are those that the network was trained to read (`NoiseSchedule.network_timestep`).
        """
        raise NotImplementedError
