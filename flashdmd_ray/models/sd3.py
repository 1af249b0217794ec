"""Stable Diffusion 3 and 3.5 over stock diffusers and transformers modules: MMDiT, VAE, two CLIP encoders, T5 on request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import SchedulerMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.config import ModelConfig
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import PARTS, Family, TextTowers, clip_ids
from flashdmd_ray.models.pipeline_source import PipelineSource

T5_LENGTH = FAMILIES["sd3"].optional_tokens  # the stock pipeline's default


class SD3Denoiser(Denoiser):
    """An `SD3Transformer2DModel`, which predicts the velocity e - x0."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    @classmethod
    def from_network_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(SD3Transformer2DModel.from_config(dict(config)))

    @classmethod
    def empty_conditioning(cls, config: Mapping[str, Any], count: int, tokens: int) -> Conditioning:
        width, pooled = config.get("joint_attention_dim", 4096), config.get("pooled_projection_dim", 2048)
        return Conditioning(torch.empty(count, tokens, width), torch.empty(count, pooled))

    @property
    def network(self) -> SD3Transformer2DModel:
        return self.transformer

    @property
    def mid_width(self) -> int:
        return int(self.transformer.inner_dim)

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.pooled is not None, "SD3 reads a pooled embedding"
        dtype = self.transformer.dtype
        prediction = self.transformer(
            hidden_states=noisy.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
        )
        return prediction.sample.float()

    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Image tokens after the middle block, as a map (B, mid_width, h / patch, w / patch); later blocks are not computed."""
        assert conditioning.pooled is not None, "SD3 reads a pooled embedding"
        network, dtype = self.transformer, self.transformer.dtype
        image = network.pos_embed(noisy.to(dtype))
        time = network.time_text_embed(timesteps, conditioning.pooled.to(dtype))
        text = network.context_embedder(conditioning.prompt_embeds.to(dtype))
        blocks = network.transformer_blocks
        for block in blocks[: (len(blocks) + 1) // 2]:
            if network.gradient_checkpointing and torch.is_grad_enabled():
                text, image = network._gradient_checkpointing_func(block, image, text, time)
            else:
                text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time)
        height = noisy.shape[-2] // int(network.config.patch_size)
        return image.transpose(1, 2).unflatten(2, (height, -1))


class SD3Text(TextTowers):
    """Two CLIP text encoders, and the T5 encoder or None."""

    def __init__(
        self,
        tokenizers: Sequence[CLIPTokenizer],
        encoders: Sequence[CLIPTextModelWithProjection],
        t5: tuple[T5TokenizerFast, T5EncoderModel] | None,
        width: int,
    ) -> None:
        """Take encoders on one device. width: of the token embeddings that the denoiser reads."""
        super().__init__()
        self.tokenizers = tuple(tokenizers)
        self.encoder, self.encoder_2 = encoders
        self.tokenizer_3: Any = t5[0] if t5 else None
        self.encoder_3: Any = t5[1] if t5 else None
        self.width = width
        self.pooled_width = sum(int(encoder.config.projection_dim) for encoder in encoders)
        # Without T5 the denoiser reads zeros in its place, as many as CLIP has tokens: so SD3's own code does it.
        self.t5_length = T5_LENGTH if t5 else int(self.tokenizers[0].model_max_length)

    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token embeddings of both CLIPs side by side (GROUP, L, D1 + D2), pooled ones (GROUP, P1 + P2), T5's if it is loaded.

        T5's are (GROUP, t5_length, width).
        """
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, (self.encoder, self.encoder_2), strict=True):
            output = encoder(clip_ids(tokenizer, texts).to(encoder.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        columns = (torch.cat(hidden, dim=-1), torch.cat(pooled, dim=-1))
        if self.encoder_3 is None:
            return columns
        ids = self.tokenizer_3(
            list(texts), padding="max_length", max_length=self.t5_length, truncation=True, return_tensors="pt"
        ).input_ids
        return *columns, self.encoder_3(ids.to(self.encoder_3.device)).last_hidden_state

    def sequences(self, clip: Tensor, t5: Tensor | None) -> Tensor:
        """Token embeddings for the denoiser (B, L + t5_length, width): CLIP's padded with zeros, then T5's or zeros."""
        clip = F.pad(clip, (0, self.width - clip.shape[-1]))
        return F.pad(clip, (0, 0, 0, self.t5_length)) if t5 is None else torch.cat([clip, t5], dim=1)


class SD3(Family):
    """StableDiffusion3Pipeline, of SD3 and SD3.5. Its unconditional branch is the embedding of ""."""

    name = "sd3"
    pipeline_class = StableDiffusion3Pipeline

    def __init__(self, model: ModelConfig, source: PipelineSource, parts: Collection[str] = PARTS) -> None:
        self._t5 = model.t5
        super().__init__(model, source, parts)

    def _load_denoiser(self, source: PipelineSource, dtype: torch.dtype) -> Denoiser:
        return SD3Denoiser(source.module(SD3Transformer2DModel, "transformer", dtype))

    def _load_text(self, source: PipelineSource, dtype: torch.dtype) -> SD3Text:
        encoders = [
            source.module(CLIPTextModelWithProjection, name, dtype) for name in ("text_encoder", "text_encoder_2")
        ]
        tokenizers = [
            source.tokenizer(CLIPTokenizer, name, encoder)
            for name, encoder in zip(("tokenizer", "tokenizer_2"), encoders, strict=True)
        ]
        t5 = None
        if self._t5:
            if not (source.index.get("text_encoder_3") or [None])[0]:
                raise ValueError(f"model.t5: {source.path} has no text_encoder_3; set it to false")
            encoder_3 = source.module(T5EncoderModel, "text_encoder_3", dtype)
            t5 = (source.tokenizer(T5TokenizerFast, "tokenizer_3", encoder_3), encoder_3)
        return SD3Text(tokenizers, encoders, t5, int(source.config("transformer")["joint_attention_dim"]))

    @property
    def text(self) -> SD3Text:
        return self._part("text")

    @property
    def pooled_width(self) -> int:
        return self.text.pooled_width

    def encode(self, texts: Sequence[str]) -> Conditioning:
        clip, pooled, *t5 = self.text(texts)
        return Conditioning(self.text.sequences(clip, t5[0] if t5 else None), pooled)

    def pipeline(self, denoiser: Denoiser, scheduler: SchedulerMixin) -> StableDiffusion3Pipeline:
        text = self.text
        return StableDiffusion3Pipeline(
            vae=self.vae,
            text_encoder=text.encoder,
            text_encoder_2=text.encoder_2,
            text_encoder_3=text.encoder_3,
            tokenizer=text.tokenizers[0],
            tokenizer_2=text.tokenizers[1],
            tokenizer_3=text.tokenizer_3,
            transformer=denoiser.network,
            scheduler=scheduler,
        )

    def load_settings(self) -> dict[str, Any]:
        # diffusers takes a component that is missing and not named for an incomplete directory.
        return {} if self._t5 else {"text_encoder_3": None, "tokenizer_3": None}

    def call_settings(self) -> dict[str, Any]:
        return super().call_settings() | {"max_sequence_length": self.text.t5_length}
