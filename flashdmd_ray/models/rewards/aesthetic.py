"""LAION's aesthetic predictor v2 (sac+logos+ava1-l14-linearMSE): how pleasing an image is, whatever its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModelWithProjection

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.rewards.base import BatchedReward, dtype_of
from flashdmd_ray.models.rewards.clip import preprocessing_of
from flashdmd_ray.models.rewards.heads import LinearHead
from flashdmd_ray.models.rewards.preprocessing import ClipPreprocessing
from flashdmd_ray.models.state_dicts import assemble, find_file, read_weights
from flashdmd_ray.models.stock_modules import load_module

_TEXT = r"(^|\.)position_ids$|^(text_model|text_projection|logit_scale)"
"""Weights of a whole CLIPModel that its image tower does not need."""


class Aesthetic(BatchedReward):
    """reward = head(image embedding of unit length). The texts are not read."""

    name = "aesthetic"

    def __init__(self, vision: CLIPVisionModelWithProjection, head: LinearHead, preprocessing: ClipPreprocessing):
        super().__init__()
        self.vision = vision
        self.head = head
        self.preprocessing = preprocessing

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """The head from `path`, CLIP's image tower and processor from `base`. Raises ValueError as `load_part` does."""
        vision = load_module(CLIPVisionModelWithProjection, settings.base_path, "", dtype_of(settings), unused=_TEXT)
        file = find_file(settings.path, settings.entry.files)
        width = vision.config.projection_dim
        head = assemble(lambda: LinearHead(width), read_weights(file), str(file), dtype_of(settings))
        return cls(vision, head, preprocessing_of(settings.base_path, vision.config.image_size))

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,) on the scale 1-10; most generated images get 5-6.5 from the published weights."""
        return self.head(self.features(images).to(self.vision.dtype)).float()

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, float32 (B, F)."""
        pixels = self.preprocessing(images.to(self.vision.device)).to(self.vision.dtype)
        return F.normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)
