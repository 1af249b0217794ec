"""HPSv2 and HPSv2.1 (arXiv 2306.09341): an open_clip ViT-H-14 tuned on preferences; reward = cos(text, image), without a logit scale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from flashdmd_ray.catalog.rewards import OPEN_CLIP_FILES
from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.rewards.base import BatchedReward, dtype_of, unique_rows
from flashdmd_ray.models.rewards.preprocessing import LongestEdgePreprocessing
from flashdmd_ray.models.state_dicts import assemble, find_file, read_weights
from flashdmd_ray.models.stock_modules import load_part

ARCHITECTURE = "ViT-H-14"


class HPSv2(BatchedReward):
    """reward = cos(text, image). The two versions differ in their weights alone and must not be compared with each other."""

    def __init__(self, clip: Any, side: int, name: str) -> None:
        """clip: an `open_clip.CLIP`. side: pixels of its images. name: "hpsv2" or "hpsv2.1"."""
        super().__init__()
        self.clip = clip
        self.name = name
        self.preprocessing = LongestEdgePreprocessing(side)
        self.tokenize = import_open_clip(name).SimpleTokenizer(context_length=clip.context_length)

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """Read the published file, or a directory in open_clip's own format, whose open_clip_config.json then says the architecture.

        Raises ValueError, one line, when open_clip is not installed or the weights are not such a model's.
        """
        open_clip = import_open_clip(settings.kind)
        file = find_file(settings.path, settings.entry.files)
        sizes = _architecture(open_clip, file)
        clip = assemble(lambda: open_clip.CLIP(**sizes), read_weights(file), str(file), dtype_of(settings))
        return cls(clip, sizes["vision_cfg"]["image_size"], settings.kind)

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,), about 0.20-0.34 for the published weights (benchmarks print 100 times that)."""
        unique, rows = unique_rows(texts, self._weight.device)
        text = self.clip.encode_text(self.tokenize(unique).to(self._weight.device)).float()
        return (self.features(images) * F.normalize(text, dim=-1)[rows]).sum(dim=-1)

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings of unit length, float32 (B, F)."""
        pixels = self.preprocessing(images.to(self._weight.device)).to(self._weight.dtype)
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    @property
    def _weight(self) -> Tensor:
        """A weight, for the model's device and type."""
        weight: Tensor = self.clip.token_embedding.weight
        return weight


def import_open_clip(kind: str) -> Any:
    """The module. Raises ValueError when it is not installed: an optional dependency."""
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"rewards of kind '{kind}' need open_clip: pip install 'flashdmd-ray[rewards]'") from None
    return open_clip


def _architecture(open_clip: Any, file: Path) -> dict[str, Any]:
    weights, config = OPEN_CLIP_FILES
    if file.name != weights:
        published: dict[str, Any] = open_clip.get_model_config(ARCHITECTURE)
        return published
    path = file.parent / config
    settings: dict[str, Any] = load_part(str(file.parent), config, lambda: json.loads(path.read_text())["model_cfg"])
    return settings
