"""Stable Diffusion 1.5 and 2.1 over stock diffusers and transformers modules: U-Net, VAE, one text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from flashdmd_ray.models.denoiser import Conditioning, Denoiser, UNetDenoiser
from flashdmd_ray.models.family import Family, TextTowers, clip_ids
from flashdmd_ray.models.pipeline_source import PipelineSource


class SD15Text(TextTowers):
    """CLIP text encoder of 1.5, or of 2.1, which is saved without its last layer."""

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder

    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token embeddings (GROUP, L, D): the last states, after the final normalisation."""
        return (self.encoder(clip_ids(self.tokenizer, texts).to(self.encoder.device)).last_hidden_state,)


class SD15(Family):
    """StableDiffusionPipeline, eps- or v-prediction as its scheduler says. There is no safety checker."""

    name = "sd15"
    pipeline_class = StableDiffusionPipeline

    def _load_denoiser(self, source: PipelineSource, dtype: torch.dtype) -> Denoiser:
        return UNetDenoiser(source.module(UNet2DConditionModel, "unet", dtype))

    def _load_text(self, source: PipelineSource, dtype: torch.dtype) -> SD15Text:
        encoder = source.module(CLIPTextModel, "text_encoder", dtype)
        return SD15Text(source.tokenizer(CLIPTokenizer, "tokenizer", encoder), encoder)

    @property
    def text(self) -> SD15Text:
        return self._part("text")

    @property
    def pooled_width(self) -> NoReturn:
        raise ValueError(f"model.family: {self.path} has no pooled prompt embedding")

    def encode(self, texts: Sequence[str]) -> Conditioning:
        (sequences,) = self.text(texts)
        return Conditioning(sequences)

    def pipeline(self, denoiser: Denoiser, scheduler: SchedulerMixin) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text.encoder,
            tokenizer=self.text.tokenizer,
            unet=denoiser.network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
