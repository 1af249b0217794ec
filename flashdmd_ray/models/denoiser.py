"""Interface of every diffusion or flow network: noisy latents, timesteps and conditioning in, prediction out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditioning:
    """Inputs of a denoiser beside latents and timesteps, one row per sample; None where the family has none.

    prompt_embeds: float (B, L, D), one vector per token.
    pooled: float (B, P), one vector per prompt (SDXL, SD3).
    time_ids: float (B, 6), SDXL's micro-conditioning (original height and width, crop top and left, target height and
    width), pixels.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        """Rows selected by a slice, an int64 tensor or a bool mask; the batch dimension stays."""
        return self._each(lambda tensor: tensor[index])

    def index_select(self, indices: Tensor) -> Conditioning:
        """Rows at int64 `indices` (N,)."""
        return self[indices.to(self.prompt_embeds.device)]

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Repeat each row `repeats` times: the order of candidates (B, K, ...) flattened to (B*K, ...)."""
        return self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str) -> Conditioning:
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        rest = (None if tensor is None else change(tensor) for tensor in (self.pooled, self.time_ids))
        return Conditioning(change(self.prompt_embeds), *rest)

    @classmethod
    def concat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate the rows of `parts`, which are of one family."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            assert len(present) in (0, len(tensors)), "conditionings of different families"
            return torch.cat(present) if present else None

        pooled, time_ids = join([part.pooled for part in parts]), join([part.time_ids for part in parts])
        return cls(torch.cat([part.prompt_embeds for part in parts]), pooled, time_ids)


class Denoiser(nn.Module, ABC):
    """Base of the networks that predict noise, velocity or flow from noisy latents.

    A subclass wraps one stock network. Schedules, not denoisers, convert predictions: `forward` answers in the
    network's own parameterisation.
    """

    @classmethod
    def from_network_config(cls, config: Mapping[str, Any]) -> Self:
        """A denoiser with random weights whose stock network has that config.json."""
        raise NotImplementedError

    @classmethod
    def empty_conditioning(cls, config: Mapping[str, Any], count: int, tokens: int) -> Conditioning:
        """Uninitialised float32 conditioning of `count` prompts, in the shapes that a network with that config.json reads."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction, float32 (B, C, h, w), for `noisy` float (B, C, h, w) at `timesteps` int64 or float (B,).

        Timesteps are those that the network was trained to read (`NoiseSchedule.network_timestep`).
        """

    @abstractmethod
    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Features from the middle of the network (B, mid_width, h', w'), for DMD2's adversary.

        Layers after the middle are not computed.
        """

    @property
    @abstractmethod
    def mid_width(self) -> int:
        """Channels of `mid_features`."""

    @property
    @abstractmethod
    def network(self) -> ModelMixin:
        """The stock network inside."""


class _MidBlockReached(Exception):  # not an error: ends a forward that has computed enough
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class UNetDenoiser(Denoiser):
    """A `UNet2DConditionModel`: SDXL's form when the conditioning has time_ids, SD1.5's and SD2.1's when not."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    @classmethod
    def from_network_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(UNet2DConditionModel.from_config(dict(config)))

    @classmethod
    def empty_conditioning(cls, config: Mapping[str, Any], count: int, tokens: int) -> Conditioning:
        embeddings = torch.empty(count, tokens, config.get("cross_attention_dim", 1280))
        if config.get("addition_embed_type") != "text_time":
            return Conditioning(embeddings)
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        return Conditioning(embeddings, torch.empty(count, pooled), torch.empty(count, 6))

    @property
    def network(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def mid_width(self) -> int:
        return int(self.unet.config.block_out_channels[-1])

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.unet.dtype
        added = None
        if conditioning.pooled is not None and conditioning.time_ids is not None:
            added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids.to(dtype)}
        prediction = self.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            added_cond_kwargs=added,
        )
        return prediction.sample.float()

    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Output of the mid block; the up path is not computed."""

        def stop(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            raise _MidBlockReached(output)

        hook = self.unet.mid_block.register_forward_hook(stop)
        try:
            self(noisy, timesteps, conditioning)
        except _MidBlockReached as reached:
            return reached.features
        finally:
            hook.remove()
        raise AssertionError("a U-Net of these families has a mid block")
