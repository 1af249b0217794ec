"""LPO's published latent rewards (arXiv 2502.01051): LRM-1.5, LRM-2.1 and LRM-XL, from their directories.

Such a directory holds unet/, text_encoder/ (and text_encoder_2/), both tuned, and state_dict.pt with the projections. Stock modules
read it: the authors' changed U-Net only returns what is taken here from its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models.config_files import check_module
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family, TextTowers, clip_ids
from flashdmd_ray.models.latent_reward.unet import UNetLatentReward
from flashdmd_ray.models.locations import fetch
from flashdmd_ray.models.reward_files import LPO_FILE, LPO_UNUSED, lpo_family
from flashdmd_ray.models.sdxl import SDXLText
from flashdmd_ray.models.state_dicts import assemble, find_file, read_file, read_weights
from flashdmd_ray.models.stock_modules import load_module, load_part, load_tokenizer
from flashdmd_ray.models.weight_files import DIFFUSERS, weight_files

GUIDANCE = 7.5
"""Guidance scale of the mid feature, as published; the other features are the conditional half."""


class LPOReward(UNetLatentReward):
    """reward = exp(logit_scale) cos(visual_projection(features), text), with text encoders of its own.

    text: for SDXL the pooled embedding of text_encoder_2; for SD1.5 that of the end-of-text token through text_projection.
    """

    parts = ()  # it has text encoders of its own
    towers: TextTowers
    family: str
    """Name of the model family whose latents it reads."""

    def score(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], family: Family) -> Tensor:
        """See `LatentRewardModel.score`. Raises ValueError for latents of another family: those of SD1.5 and SDXL have one shape."""
        if family.name != self.family:
            raise ValueError(
                f"the latent reward reads latents of family '{self.family}', these are of '{family.name}'; choose another"
            )
        return self(noisy, family.schedule.network_timestep(timesteps), self._encode(texts, noisy.device))

    def features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        conditional = super().features(noisy, timesteps, conditioning)
        empty = self._encode([""] * len(noisy), noisy.device)
        unconditional = super().features(noisy, timesteps, empty)
        mid = int(self.unet.mid_block.resnets[-1].out_channels)
        guided = torch.lerp(unconditional[:, -mid:], conditional[:, -mid:], GUIDANCE)
        return torch.cat([conditional[:, :-mid], guided], dim=1)

    def _encode(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        tokens, pooled = (part.to(device) for part in self.towers(texts))
        if self.text_projection is not None:
            return Conditioning(tokens, pooled)
        side = 8.0 * self.unet.config.sample_size  # the authors always state the U-Net's own size and no crop
        row = torch.tensor([side, side, 0.0, 0.0, side, side], device=device)
        return Conditioning(tokens, pooled, row.repeat(len(texts), 1))

    def _text(self, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None, "made by _encode"
        if self.text_projection is None:
            return conditioning.pooled
        return self.text_projection(conditioning.pooled.to(self.text_projection.weight.dtype))


class PooledText(TextTowers):
    """SD1.5's text encoder: token embeddings (GROUP, L, D) and the state of the end-of-text token (GROUP, D)."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder

    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        output = self.encoder(clip_ids(self.tokenizer, texts).to(self.encoder.device))
        return output.last_hidden_state, output.pooler_output


def load_lpo(path: str, base: str | None, dtype: torch.dtype) -> LPOReward:
    """The reward in a directory or in owner/name/folder on the hub.

    base: directory or hub id of the pipeline that it was made from, for its tokenizers; None is the directory itself if it has them, else
    the published pipeline. Raises ValueError, one line naming the path and the remedy.
    """
    root = load_part(path, "", lambda: fetch(path, "unet", lambda folder: weight_files(folder, DIFFUSERS), DIFFUSERS))
    family = lpo_family(path)
    if family is None:
        raise ValueError(f"{path} has the text encoders of no family that LPO published a reward for; choose another")
    state, width = _projections(find_file(path, [LPO_FILE]))
    config = load_part(path, "unet", lambda: check_module(root / "unet" / "config.json"))
    for header in load_part(path, "unet", lambda: weight_files(root / "unet", DIFFUSERS)).headers:
        weights = read_weights(header.path).items()
        state |= {f"unet.{name}": value for name, value in weights if not name.startswith(LPO_UNUSED)}
    model = load_part(path, "", lambda: assemble(lambda: LPOReward(config, width), state, path, dtype))
    own = path if (root / "tokenizer").is_dir() else FAMILIES[family].lpo_base
    model.family = family
    model.towers = _towers(path, str(base or own), family, dtype)
    reward: LPOReward = model.requires_grad_(False).eval()
    return reward


def _projections(file: Path) -> tuple[dict[str, Tensor], int]:
    """Contents of state_dict.pt under the names of the module, and the width that image and text are compared in."""
    try:
        state = flat(read_file(file))
        return state, int(state["visual_projection.weight"].shape[0])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not that of a published latent reward ({error!r}); choose another directory"
        ) from None


def flat(nested: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flatten {"visual_projection": {"weight": w}, "logit_scale": s} to {"visual_projection.weight": w, "logit_scale": s}."""
    state: dict[str, Tensor] = {}
    for name, value in nested.items():
        if isinstance(value, Tensor | float | int):  # LPO's training code saves logit_scale as a plain number
            state[name] = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
        else:
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in value.items()}
    return state


def _towers(path: str, base: str, family: str, dtype: torch.dtype) -> TextTowers:
    def tokenizer(folder: str, encoder: Any) -> Any:
        return load_tokenizer(base, folder, encoder.config.max_position_embeddings, encoder.config.vocab_size)

    encoder = load_module(CLIPTextModel, path, "text_encoder", dtype)
    if "text_encoder_2" not in FAMILIES[family].text_encoders:
        return PooledText(tokenizer("tokenizer", encoder), encoder)
    second = load_module(CLIPTextModelWithProjection, path, "text_encoder_2", dtype)
    return SDXLText([tokenizer("tokenizer", encoder), tokenizer("tokenizer_2", second)], encoder, second)
