"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while looking at the image, a linear head makes a reward of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.rewards.base import BatchedReward, dtype_of
from flashdmd_ray.models.rewards.heads import LinearHead
from flashdmd_ray.models.rewards.preprocessing import TorchvisionPreprocessing
from flashdmd_ray.models.state_dicts import assemble, find_file, read_weights
from flashdmd_ray.models.stock_modules import load_part, load_tokenizer

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data: rewards are standardised by them."""
TOKENS = 35
"""Prompts are cut here, as in training: the end of a long prompt is not judged."""
HEAD_WIDTH = 64
"""Of each attention head in every ViT of BLIP."""

# BLIP's names -> those of transformers, in this order.
_VISION_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"\.attn\.", ".self_attn."),
    (r"\.proj\.", ".projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)
# Of BLIP's pre-training, or constants: not part of the reward.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")


class ImageReward(BatchedReward):
    """reward = (head(cls) - MEAN) / STD, cls the first token of BLIP's text encoder with cross-attention to the image."""

    name = "imagereward"

    def __init__(
        self, vision: BlipVisionModel, text: BlipTextModel, head: LinearHead, tokenizer: BertTokenizer
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head
        self.tokenizer = tokenizer
        side = vision.config.image_size
        self.preprocessing = TorchvisionPreprocessing(side, (side, side))

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """The published file, with med_config.json beside it when the text encoder is not BERT base; BERT's tokenizer from `base`.

        Raises ValueError, one line naming the path and the remedy, when something is missing, damaged or of another model.
        """
        file = find_file(settings.path, settings.entry.files)
        vision, text, head = modules_of(read_weights(file), _med_config(file.parent), str(file), dtype_of(settings))
        tokenizer = load_tokenizer(settings.base_path, "", None, text.config.vocab_size, BertTokenizer)
        return cls(vision, text, head, tokenizer)

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,), standardised: about -2 to 2."""
        device = self.vision.device
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(device)
        pixels = self.preprocessing(images.to(device)).to(self.vision.dtype)
        image = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.int64, device=device),
            is_decoder=False,
        )
        return (self.head(read.last_hidden_state[:, 0]).float() - MEAN) / STD


def modules_of(
    state: Mapping[str, Tensor], med: Mapping[str, Any], what: str, dtype: torch.dtype = torch.float32
) -> tuple[BlipVisionModel, BlipTextModel, LinearHead]:
    """Image tower, text encoder and head of a checkpoint under its published names; sizes are read from its shapes.

    med: keys of med_config.json that differ from BERT base. Raises ValueError, naming `what`, when it is not an ImageReward's.
    """
    named = [(name, tensor) for name, tensor in state.items() if not _UNUSED.match(name)]
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, tensor in named:
        start = next((start for start in parts if name.startswith(start)), None)
        if start is None:
            raise ValueError(f"{what} has an unknown weight {name!r}: it is no ImageReward checkpoint")
        parts[start][name.removeprefix(start)] = tensor
    vision, text, mlp = parts.values()
    try:
        vision_config = _vision_config(vision)
        text_config = _text_config(text, med, vision_config.hidden_size)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{what} lacks the weight {error}: it is no ImageReward checkpoint") from None
    renamed = {_vision_name(name): tensor for name, tensor in vision.items()}
    return (
        assemble(lambda: BlipVisionModel(vision_config), renamed, what, dtype),
        assemble(lambda: BlipTextModel(text_config, add_pooling_layer=False), text, what, dtype),
        assemble(lambda: LinearHead(text_config.hidden_size), mlp, what, dtype),
    )


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _vision_config(state: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    patches = state["pos_embed"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(state, r"blocks\.(\d+)\."),
        num_attention_heads=width // HEAD_WIDTH,
        patch_size=patch,
        image_size=patch * round(patches**0.5),
        layer_norm_eps=1e-6,
    )


def _text_config(state: Mapping[str, Tensor], med: Mapping[str, Any], image_width: int) -> BlipTextConfig:
    vocabulary, width = state["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=med.get("num_attention_heads", 12),  # transformers' default of 8 is not BERT's
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=med.get("layer_norm_eps", 1e-12),
        is_decoder=True,  # otherwise there are no cross-attention layers
    )


def _depth(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in state if (match := re.match(pattern, name)))


def _med_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "med_config.json"
    if not file.is_file():
        return {}
    config: Mapping[str, Any] = load_part(str(file), "", lambda: json.loads(file.read_text(encoding="utf-8")))
    return config
