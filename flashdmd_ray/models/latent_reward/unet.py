"""The latent reward of a U-Net: LPO's layout, its down and mid blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn

from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.latent_reward.base import LatentRewardModel


class UNetLatentReward(LatentRewardModel):
    """For SDXL's form (text_time conditioning) and that of SD1.5 and SD2.1 (none).

    Features are the output of the last layer of each down block before it is made smaller, and of the mid block. LPO applies
    classifier-free guidance to the mid feature; here rewards are conditional only, which halves their cost. Only the blocks that are
    needed are kept: no up blocks, no output layers.
    """

    kind = "unet"

    @classmethod
    def from_description(cls, config: Mapping[str, Any]) -> Self:
        return cls(config["unet"], config["text_width"])

    def __init__(self, unet_config: Mapping[str, Any], text_width: int) -> None:
        unet = UNet2DConditionModel.from_config(dict(unet_config))
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(unet, unused)
        token_width = None if unet.config.addition_embed_type == "text_time" else int(unet.config.cross_attention_dim)
        super().__init__(sum(_feature_widths(unet)), text_width, token_width)
        self.unet = unet

    @classmethod
    def from_denoiser(cls, network: ModelMixin, blocks: int | None = None) -> Self:
        """See `LatentRewardModel.from_denoiser`. Raises ValueError for a number of blocks: a U-Net's are all kept."""
        if blocks is not None:
            raise ValueError("latent_reward.blocks: a latent reward of a U-Net has its down and mid blocks; leave null")
        return cls.from_unet(network)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, text_width: int | None = None) -> Self:
        """A model whose blocks are float32 copies of `unet`'s; the projections are random and must be trained.

        text_width: None is that of the pooled embedding, or of a token's state where there is none.
        """
        model = cls(unet.config, _text_width(unet.config) if text_width is None else text_width)
        weights = {name: value for name, value in unet.state_dict().items() if name in model.unet.state_dict()}
        model.unet.load_state_dict(weights)
        return model

    @property
    def network(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def last_part(self) -> str:
        """Name of the mid block."""
        return "unet.mid_block"

    def description(self) -> Mapping[str, Any]:
        return {"unet": dict(self.unet.config), "text_width": self.text_width}

    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        unet, dtype = self.unet, self.unet.dtype
        sample, tokens = noisy.to(dtype), conditioning.prompt_embeds.to(dtype)
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
        if conditioning.pooled is not None and conditioning.time_ids is not None:
            added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids.to(dtype)}
            embedding = embedding + unet.get_aug_embed(
                emb=embedding, encoder_hidden_states=tokens, added_cond_kwargs=added
            )
        hidden = unet.conv_in(sample)
        features = []
        for block in unet.down_blocks:
            hidden, residuals = _run(block, hidden, embedding, tokens)
            features.append(residuals[len(block.resnets) - 1])
        features.append(_run(unet.mid_block, hidden, embedding, tokens))
        return torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1)


def _run(block: nn.Module, hidden: Tensor, embedding: Tensor, tokens: Tensor) -> Any:
    if getattr(block, "has_cross_attention", False):
        return block(hidden, temb=embedding, encoder_hidden_states=tokens)
    return block(hidden, temb=embedding)


def _feature_widths(unet: UNet2DConditionModel) -> list[int]:
    blocks = [*unet.down_blocks, unet.mid_block]
    return [block.resnets[-1].out_channels for block in blocks]


def _text_width(config: Mapping[str, Any]) -> int:
    if config["addition_embed_type"] == "text_time":
        return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])
    return int(config["cross_attention_dim"])
