"""PickScore, and any other CLIPModel trained on preferences in its format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from flashdmd_ray.models.loading import load_module, load_part, load_tokenizer
from flashdmd_ray.models.rewards.preprocessing import ClipPreprocessing


class PickScore:
    """reward = exp(logit_scale) cos(text, image)."""

    name = "pickscore"

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: ClipPreprocessing) -> None:
        self.clip = clip
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype = torch.float32) -> Self:
        """Read a directory or hub repository with model, tokenizer and image processor.

        Raises ValueError, one line naming the path and the remedy, when something is missing, damaged or not CLIP.
        """
        path = str(path)
        clip = load_module(CLIPModel, path, "", dtype)
        text = clip.config.text_config
        tokenizer = load_tokenizer(path, "", text.max_position_embeddings, text.vocab_size)

        def load_preprocessing() -> ClipPreprocessing:
            preprocessing = ClipPreprocessing.from_processor(CLIPImageProcessor.from_pretrained(path))
            side = clip.config.vision_config.image_size
            if preprocessing.crop != (side, side):
                raise ValueError(f"its processor crops to {preprocessing.crop}, the model reads {side}x{side}")
            return preprocessing

        return cls(clip, tokenizer, load_part(path, "the image processor", load_preprocessing))

    def to(self, device: torch.device | str) -> Self:
        self.clip.to(device)
        self.preprocessing.to(device)
        return self

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,), about 15-25 for the published weights; see `PixelReward.score`."""
        assert len(images) == len(texts), f"{len(images)} images for {len(texts)} texts"
        unique = list(dict.fromkeys(texts))  # the candidates of a group share their prompt
        rows = torch.tensor([unique.index(text) for text in texts], device=self.clip.device)
        # Always padded to full length: the text towers are causal, so padding changes nothing but keeps one shape.
        tokens = self.tokenizer(
            unique,
            padding="max_length",
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = self.preprocessing(images.to(self.clip.device)).to(self.clip.dtype)
        # The model's own call, not get_text_features: its embeddings are normalised in every transformers version.
        output = self.clip(input_ids=tokens.input_ids.to(self.clip.device), pixel_values=pixels)
        cosine = (output.image_embeds.float() * output.text_embeds.float()[rows]).sum(dim=-1)
        return self.clip.logit_scale.float().exp() * cosine

    def features(self, images: Tensor) -> Tensor:
        """The image embeddings that rewards are computed from, of unit length, float32 (B, F)."""
        pixels = self.preprocessing(images.to(self.clip.device)).to(self.clip.dtype)
        embeddings = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(embeddings.float(), dim=-1)
