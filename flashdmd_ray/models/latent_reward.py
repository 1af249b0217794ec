"""Latent reward model: scores noisy latents at any timestep against a prompt, without decoding them.

The layout of LPO's LRM: the diffusion model's own down and mid blocks look at the noisy latent; their features are
average-pooled, concatenated and projected without bias to the width of the pooled text embedding; the score is
exp(logit_scale) times the cosine of the two. LPO additionally applies classifier-free guidance to the mid feature;
here the score is conditional only, which halves its cost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"


class LatentRewardModel(nn.Module):
    """Score of noisy latents under a prompt, for any SDXL-form `UNet2DConditionModel`.

    Made from a U-Net configuration (random weights), from a trained diffusion model (`from_unet`) or from a saved
    directory (`from_pretrained`). Only the blocks that the score needs are kept: no up blocks, no output layers.
    """

    def __init__(self, unet_config: Mapping[str, Any], text_width: int) -> None:
        """`text_width`: size of the pooled text embedding that scores are compared with."""
        super().__init__()
        unet = UNet2DConditionModel.from_config(dict(unet_config))
        for unused in ("up_blocks", "conv_norm_out", "conv_act", "conv_out"):
            delattr(unet, unused)
        self.unet = unet
        self.text_width = text_width
        self.visual_projection = nn.Linear(sum(_feature_widths(unet)), text_width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, text_width: int) -> LatentRewardModel:
        """A model whose blocks are copies of `unet`'s; the projection is random and must be trained."""
        model = cls(unet.config, text_width)
        kept = {name: value for name, value in unet.state_dict().items() if name in model.unet.state_dict()}
        model.unet.load_state_dict(kept)
        return model

    @classmethod
    def from_pretrained(cls, path: Path | str) -> LatentRewardModel:
        """Load a directory written by `save_pretrained`, as float32. Raises ValueError when it is not one."""
        path = Path(path)
        try:
            config = json.loads((path / _CONFIG_FILE).read_text())
            model = cls(config["unet"], config["text_width"])
            state = load_file(path / _WEIGHTS_FILE)
            if config["base_unet"] is not None:
                state |= {
                    name: value
                    for name, value in _unet_state(path / config["base_unet"]).items()
                    if name not in state and name in model.state_dict()
                }
            model.load_state_dict({name: value.float() for name, value in state.items()})
        except FileNotFoundError as error:
            raise ValueError(f"{path} is not a complete latent reward model: {error}") from error
        except (KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} does not hold a latent reward model: {error}") from error
        return model

    def save_pretrained(
        self, path: Path | str, *, dtype: torch.dtype = torch.float32, base_unet: Path | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors`, the weights in `dtype`.

        With `base_unet`, a U-Net directory that will lie at the same place relative to `path` when the model is
        loaded, weights that equal the base's are left out.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        base = None
        if base_unet is not None:
            base = os.path.relpath(base_unet, path)
            shared = _unet_state(base_unet)
            same = {n for n, v in state.items() if n in shared and torch.equal(v, shared[n].to(dtype))}
            state = {name: value for name, value in state.items() if name not in same}
        config = {"unet": dict(self.unet.config), "text_width": self.text_width, "base_unet": base}
        (path / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(state, path / _WEIGHTS_FILE)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Scores (B,): higher is better, comparable only between latents of one prompt and timestep.

        noisy_latents (B, C, h, w) floating; timesteps (B,) int64 in [0, 1000); prompt_embeds (B, L, D) and
        pooled_prompt_embeds (B, text_width) as the U-Net takes them; time_ids (B, 6).
        """
        image = self.visual_projection(
            self._features(
                noisy_latents,
                timesteps,
                prompt_embeds,
                {
                    "text_embeds": pooled_prompt_embeds,
                    "time_ids": time_ids,
                },
            )
        )
        cosine = F.cosine_similarity(image.float(), pooled_prompt_embeds.float(), dim=-1)
        return self.logit_scale.exp() * cosine

    def _features(
        self,
        sample: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        added: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """(B, sum of widths): pooled output of the last layer before each downsampling, then of the mid block."""
        unet = self.unet
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timesteps))
        embedding = embedding + unet.get_aug_embed(
            emb=embedding, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added
        )
        hidden = unet.conv_in(sample)
        features = []
        for block in unet.down_blocks:
            hidden, residuals = _run(block, hidden, embedding, prompt_embeds)
            features.append(residuals[len(block.resnets) - 1])
        features.append(_run(unet.mid_block, hidden, embedding, prompt_embeds))
        return torch.cat([feature.mean(dim=(2, 3)) for feature in features], dim=1)


def _unet_state(path: Path) -> dict[str, torch.Tensor]:
    """Weights of a U-Net directory under the names they have inside the reward model."""
    state = load_file(path / "diffusion_pytorch_model.safetensors")
    return {f"unet.{name}": value for name, value in state.items()}


def _run(block: nn.Module, hidden: torch.Tensor, embedding: torch.Tensor, prompt_embeds: torch.Tensor) -> Any:
    if getattr(block, "has_cross_attention", False):
        return block(hidden, temb=embedding, encoder_hidden_states=prompt_embeds)
    return block(hidden, temb=embedding)


def _feature_widths(unet: UNet2DConditionModel) -> list[int]:
    blocks = [*unet.down_blocks, unet.mid_block]
    return [block.resnets[-1].out_channels for block in blocks]
