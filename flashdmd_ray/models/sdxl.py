"""The SDXL family over stock diffusers and transformers modules: U-Net, VAE, two text encoders, micro-conditioning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.config import ModelConfig
from flashdmd_ray.models.denoiser import Conditioning, Denoiser, UNetDenoiser
from flashdmd_ray.models.family import PARTS, Family, TextTowers, clip_ids
from flashdmd_ray.models.pipeline_source import PipelineSource


class SDXLText(TextTowers):
    """SDXL's two CLIP text encoders with their tokenizers."""

    def __init__(
        self, tokenizers: Sequence[CLIPTokenizer], encoder: CLIPTextModel, encoder_2: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.tokenizers = tuple(tokenizers)
        self.encoder = encoder
        self.encoder_2 = encoder_2
        # Shapes of the embeddings, which the zero embeddings need before any prompt is encoded.
        self.length = int(self.tokenizers[0].model_max_length)
        self.width = int(encoder.config.hidden_size + encoder_2.config.hidden_size)
        self.pooled_width = int(encoder_2.config.projection_dim)

    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token embeddings (GROUP, L, D), the penultimate states of both encoders, and pooled embeddings (GROUP, P)."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, (self.encoder, self.encoder_2), strict=True):
            output = encoder(clip_ids(tokenizer, texts).to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])  # the penultimate layer, as SDXL was trained
        return torch.cat(hidden, dim=-1), output.text_embeds


class SDXL(Family):
    """StableDiffusionXLPipeline. Its unconditional branch is zero, or the embedding of "" where the model says so."""

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline

    def __init__(self, model: ModelConfig, source: PipelineSource, parts: Collection[str] = PARTS) -> None:
        super().__init__(model, source, parts)
        self.zero_unconditional = bool(source.index.get("force_zeros_for_empty_prompt", True))
        self.original_size = model.original_size or self.image_size
        self.crop = model.crop or (0, 0)

    def _load_denoiser(self, source: PipelineSource, dtype: torch.dtype) -> Denoiser:
        return UNetDenoiser(source.module(UNet2DConditionModel, "unet", dtype))

    def _load_text(self, source: PipelineSource, dtype: torch.dtype) -> SDXLText:
        encoder = source.module(CLIPTextModel, "text_encoder", dtype)
        encoder_2 = source.module(CLIPTextModelWithProjection, "text_encoder_2", dtype)
        tokenizers = [
            source.tokenizer(CLIPTokenizer, "tokenizer", encoder),
            source.tokenizer(CLIPTokenizer, "tokenizer_2", encoder_2),
        ]
        return SDXLText(tokenizers, encoder, encoder_2)

    @property
    def text(self) -> SDXLText:
        return self._part("text")

    @property
    def pooled_width(self) -> int:
        return self.text.pooled_width

    def _time_ids(self, count: int) -> Tensor:
        values = [*self.original_size, *self.crop, *self.image_size]
        row = torch.tensor(values, dtype=torch.float32, device=self.device)
        return row.repeat(count, 1)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        sequences, pooled = self.text(texts)
        return Conditioning(sequences, pooled, self._time_ids(len(texts)))

    def unconditional(self, count: int) -> Conditioning:
        """See `Family.unconditional`: zero embeddings, or those of "" where the model was trained so."""
        if not self.zero_unconditional:
            return super().unconditional(count)
        towers = self.text
        sequences = torch.zeros(count, towers.length, towers.width, device=self.device)
        pooled = torch.zeros(count, towers.pooled_width, device=self.device)
        return Conditioning(sequences, pooled, self._time_ids(count))

    def pipeline(self, denoiser: Denoiser, scheduler: SchedulerMixin) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text.encoder,
            text_encoder_2=self.text.encoder_2,
            tokenizer=self.text.tokenizers[0],
            tokenizer_2=self.text.tokenizers[1],
            unet=denoiser.network,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zero_unconditional,
        )

    def call_settings(self) -> dict[str, Any]:
        settings = super().call_settings()
        if self.original_size != self.image_size:
            settings["original_size"] = tuple(self.original_size)
        if self.crop != (0, 0):
            settings["crops_coords_top_left"] = tuple(self.crop)
        return settings
