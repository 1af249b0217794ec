"""The latent reward of an SD3-form transformer (MMDiT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import ModelMixin, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional as F

from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.latent_reward.base import LatentRewardModel

FEATURES = 4
"""Blocks whose image tokens are read: as many as an SDXL U-Net has levels, the mid block included."""


class MMDiTLatentReward(LatentRewardModel):
    """The first blocks of the transformer; image tokens after up to four of them, evenly spaced, the last included.

    Why so: an MMDiT has one width and no resolutions, so depth takes the place of the U-Net's levels: early blocks see strokes and noise,
    later ones the layout, and several of them let the projection choose. The first half of the blocks stands for the U-Net's down and mid
    path: what comes after it turns features back into a velocity, and leaving it out halves the cost. Tokens are normalised without
    weights before they are averaged, as the transformer's own output layer does, because the residual stream grows with depth and the
    last block would drown the others. The prompt enters twice: joint attention mixes the text's tokens into the image's at every
    block, and the pooled embedding, the sum of timestep and text that modulates every block, is what the average is compared with.
    """

    kind = "transformer"

    @classmethod
    def from_description(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["transformer"])

    def __init__(self, transformer_config: Mapping[str, Any]) -> None:
        """Make a model with random weights. transformer_config: its num_layers is the number of blocks that are kept."""
        transformer = SD3Transformer2DModel.from_config(dict(transformer_config))
        for unused in ("norm_out", "proj_out"):
            delattr(transformer, unused)
        self._read = read_after(len(transformer.transformer_blocks))
        width = int(transformer.inner_dim)
        super().__init__(len(self._read) * width, int(transformer.config.pooled_projection_dim), None)
        self.transformer = transformer

    @classmethod
    def from_denoiser(cls, network: ModelMixin, blocks: int | None = None) -> Self:
        """See `LatentRewardModel.from_denoiser`; `blocks` None keeps the first half."""
        return cls.from_transformer(network, blocks)

    @classmethod
    def from_transformer(cls, transformer: SD3Transformer2DModel, blocks: int | None = None) -> Self:
        """A model whose first `blocks` blocks (None: half) are float32 copies; the projection is random and must be trained.

        Raises ValueError for a number of blocks that the transformer does not have.
        """
        total = len(transformer.transformer_blocks)
        count = (total + 1) // 2 if blocks is None else blocks
        if not 1 <= count <= total:
            raise ValueError(f"the transformer has {total} blocks, {count} cannot be kept; choose 1 to {total}")
        dual = tuple(block for block in transformer.config.dual_attention_layers if block < count)
        model = cls({**transformer.config, "num_layers": count, "dual_attention_layers": dual})
        names = set(model.transformer.state_dict())
        weights = model.as_blocks(transformer.state_dict())
        model.transformer.load_state_dict({name: value for name, value in weights.items() if name in names})
        return model

    def as_blocks(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        last = len(self.transformer.transformer_blocks) - 1
        has_more = f"transformer_blocks.{last + 1}.attn.to_q.weight" in state
        return last_text_norm(state, last) if has_more else state

    @property
    def network(self) -> SD3Transformer2DModel:
        return self.transformer

    @property
    def last_part(self) -> str:
        """Name of the last block."""
        return f"transformer.transformer_blocks.{len(self.transformer.transformer_blocks) - 1}"

    def description(self) -> Mapping[str, Any]:
        return {"transformer": dict(self.transformer.config)}

    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None, "SD3 reads a pooled embedding"
        network, dtype = self.transformer, self.transformer.dtype
        image = network.pos_embed(noisy.to(dtype))
        time = network.time_text_embed(timesteps, conditioning.pooled.to(dtype))
        text = network.context_embedder(conditioning.prompt_embeds.to(dtype))
        features = []
        for number, block in enumerate(network.transformer_blocks):
            if network.gradient_checkpointing and torch.is_grad_enabled():
                text, image = network._gradient_checkpointing_func(block, image, text, time)
            else:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
            if number in self._read:
                features.append(F.layer_norm(image, image.shape[-1:], eps=1e-6).mean(dim=1))
        return torch.cat(features, dim=1)


def read_after(blocks: int) -> tuple[int, ...]:
    """Indices of the blocks after which image tokens are read: up to FEATURES, evenly spaced, the last included."""
    count = min(FEATURES, blocks)
    return tuple((number + 1) * blocks // count - 1 for number in range(count))


def last_text_norm(state: Mapping[str, Tensor], block: int) -> dict[str, Tensor]:
    """Copy of `state` with the text norm of `block` as a transformer that ends there has it.

    A block that is not the last modulates the text by six vectors (shift, scale and gate of attention and of MLP); the last one only
    by (scale, shift) of attention, as the text goes nowhere after it.
    """
    changed = dict(state)
    for name in ("weight", "bias"):
        key = f"transformer_blocks.{block}.norm1_context.linear.{name}"
        shift, scale, *_ = state[key].chunk(6)
        changed[key] = torch.cat([scale, shift])
    return changed
