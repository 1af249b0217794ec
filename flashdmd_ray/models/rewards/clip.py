"""Rewards that are a cosine of a CLIPModel: PickScore and CLIPScore."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.rewards.base import BatchedReward, dtype_of, unique_rows
from flashdmd_ray.models.rewards.preprocessing import ClipPreprocessing
from flashdmd_ray.models.state_dicts import assemble, read_weights
from flashdmd_ray.models.stock_modules import load_module, load_part, load_tokenizer


class ClipReward(BatchedReward):
    """A reward computed from the towers of a CLIPModel."""

    def __init__(self, clip: CLIPModel, tokenizer: CLIPTokenizer, preprocessing: ClipPreprocessing) -> None:
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """Read a directory or hub repository, tokenizer and image processor from `base`; or one file, its sizes from there too.

        Raises ValueError, one line naming the path and the remedy, when something is missing, damaged or not CLIP.
        """
        if Path(settings.path).is_file():
            config = load_part(settings.base_path, "", lambda: CLIPConfig.from_pretrained(settings.base_path))
            clip = clip_of(read_weights(Path(settings.path)), config, settings.path, dtype_of(settings))
        else:
            clip = load_module(CLIPModel, settings.path, "", dtype_of(settings))
        side = clip.config.vision_config.image_size
        return cls(
            clip, tokenizer_of(settings.base_path, clip.config.text_config), preprocessing_of(settings.base_path, side)
        )

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids int64 (B, L). Always padded to full length: a causal tower is not changed by it, and keeps one shape."""
        length = self.clip.config.text_config.max_position_embeddings
        encoded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids: Tensor = encoded.input_ids
        return ids.to(self.clip.device)

    def pixels(self, images: Tensor) -> Tensor:
        """Images in the size and type that the vision tower reads."""
        return self.preprocessing(images.to(self.clip.device)).to(self.clip.dtype)

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines float32 (B,) between each image and its text."""
        unique, rows = unique_rows(texts, self.clip.device)
        # The model's own call, not get_text_features: its embeddings are normalised in every transformers version.
        output = self.clip(input_ids=self.tokens(unique), pixel_values=self.pixels(images))
        return (output.image_embeds.float() * output.text_embeds.float()[rows]).sum(dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """The image embeddings that rewards are computed from, of unit length, float32 (B, F)."""
        embeddings = self.clip.visual_projection(self.clip.vision_model(pixel_values=self.pixels(images)).pooler_output)
        return F.normalize(embeddings.float(), dim=-1)


class CosineReward(ClipReward):
    """A reward that is a function of one cosine."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """The text embeddings that rewards are computed from, of unit length, float32 (B, F)."""
        embeddings = self.clip.text_projection(self.clip.text_model(input_ids=self.tokens(texts)).pooler_output)
        return F.normalize(embeddings.float(), dim=-1)

    @abstractmethod
    def reward(self, cosine: Tensor) -> Tensor:
        """Rewards float32 (B,) of cosines float32 (B,) between images and texts."""

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,)."""
        return self.reward(self.cosine(images, texts))


class PickScore(CosineReward):
    """reward = exp(logit_scale) cos(text, image), as arXiv 2305.01569; any CLIPModel trained on preferences in its format."""

    name = "pickscore"

    def reward(self, cosine: Tensor) -> Tensor:
        """Rewards float32 (B,), about 15-25 for the published weights."""
        return self.clip.logit_scale.float().exp() * cosine


class ClipScore(CosineReward):
    """reward = max(100 cos(text, image), 0), as torchmetrics' CLIPScore; the prompt as it is, without a prefix."""

    name = "clipscore"

    def reward(self, cosine: Tensor) -> Tensor:
        """Rewards float32 (B,), about 15-35 for CLIP ViT-L/14."""
        return (100 * cosine).clamp(min=0)


def clip_of(state: Mapping[str, Tensor], config: CLIPConfig, what: str, dtype: torch.dtype) -> CLIPModel:
    """The CLIPModel with these weights. Raises ValueError, naming `what`, when they are of another one."""
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}  # once saved
    model: CLIPModel = assemble(lambda: CLIPModel(config), weights, what, dtype)
    return model


def tokenizer_of(path: str, text: Any) -> CLIPTokenizer:
    """The tokenizer at `path` for a text tower with that configuration. Raises ValueError as `load_part` does."""
    tokenizer: CLIPTokenizer = load_tokenizer(path, "", text.max_position_embeddings, text.vocab_size)
    return tokenizer


def preprocessing_of(path: str, side: int) -> ClipPreprocessing:
    """The image processor at `path` for images of `side` pixels. Raises ValueError as `load_part` does."""

    def load() -> ClipPreprocessing:
        preprocessing = ClipPreprocessing.from_processor(CLIPImageProcessor.from_pretrained(path))
        if preprocessing.crop != (side, side):
            raise ValueError(f"its processor crops to {preprocessing.crop}, the model reads {side}x{side}")
        return preprocessing

    preprocessing: ClipPreprocessing = load_part(path, "the image processor", load)
    return preprocessing
