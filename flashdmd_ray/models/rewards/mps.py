"""MPS, the multi-dimensional preference score (arXiv 2405.14705), its overall dimension.

CLIP's image tokens attend to those words of the prompt that the condition names; the first of them is compared with the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.models.rewards.base import dtype_of, unique_rows
from flashdmd_ray.models.rewards.clip import ClipReward, clip_of, preprocessing_of, tokenizer_of
from flashdmd_ray.models.rewards.preprocessing import ClipPreprocessing
from flashdmd_ray.models.state_dicts import assemble, find_file, read_weights
from flashdmd_ray.models.stock_modules import load_part

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, quantity, "
    "attributes, position, number, location, word, things."
)
"""Condition of the overall dimension, as in the authors' evaluation."""
THRESHOLD = 0.3
"""Least similarity of a word to the condition, relative to the prompt's most similar word.

As in both published evaluations; the model file, which they do not call, says 0.01."""
LAYERS, HEAD_WIDTH, WIDER = 4, 64, 4
_UNUSED = (".rotary_emb.inv_freq", ".norm.bias")
"""Buffers that were saved with the weights: rotary frequencies, and the zeros of norms without a bias."""


class MPS(ClipReward):
    """reward = exp(logit_scale) cos(text, cross(image tokens, text tokens)[first]).

    The published code divides similarities by their maximum over the whole batch, so that a reward depends on its neighbours; here it is
    the maximum of each prompt, which is the published result for a batch of one.
    """

    name = "mps"

    def __init__(
        self, clip: CLIPModel, cross: CrossModel, tokenizer: CLIPTokenizer, preprocessing: ClipPreprocessing
    ) -> None:
        super().__init__(clip, tokenizer, preprocessing)
        self.cross = cross

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """Converted weights (safetensors; the original is a pickled module and refused), CLIP's configuration, tokenizer and image
        processor from `base`. Raises ValueError as `load_part` does."""
        file = find_file(settings.path, settings.entry.files)
        config = load_part(settings.base_path, "", lambda: CLIPConfig.from_pretrained(settings.base_path))
        clip, cross = modules_of(read_weights(file), config, str(file), dtype_of(settings))
        side = config.vision_config.image_size
        return cls(
            clip,
            cross,
            tokenizer_of(settings.base_path, config.text_config),
            preprocessing_of(settings.base_path, side),
        )

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,), about 11-13 for the published weights."""
        unique, rows = unique_rows(texts, self.clip.device)
        words, sentences = self._read(unique)
        condition, _ = self._read([CONDITION])
        similar = torch.einsum("bid,jd->bij", words.float(), condition[0].float()).amax(dim=2)
        selected = similar / similar.amax(dim=1, keepdim=True) > THRESHOLD
        tokens = self.clip.visual_projection(self.clip.vision_model(pixel_values=self.pixels(images)).last_hidden_state)
        image = self.cross(tokens, words[rows], selected[rows])[:, 0]
        cosine = F.cosine_similarity(sentences.float()[rows], image.float(), dim=-1)
        return self.clip.logit_scale.float().exp() * cosine

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected tokens (B, L, D) with those of the padding, which take part, and the projected end of text (B, D)."""
        output = self.clip.text_model(input_ids=self.tokens(texts))
        return self.clip.text_projection(output.last_hidden_state), self.clip.text_projection(output.pooler_output)


class CrossModel(nn.Module):
    """Image tokens that attend to words, then to each other, four times."""

    def __init__(self, width: int, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([CrossBlock(width), SelfBlock(width)]) for _ in range(layers))

    def forward(self, image: Tensor, words: Tensor, selected: Tensor) -> Tensor:
        """Image tokens (B, N, D) of `image` (B, N, D), `words` (B, L, D) and which of them count, bool (B, L)."""
        cross: nn.Module
        own: nn.Module
        for cross, own in self.layers:  # type: ignore[misc]
            image = image + cross(image, words, selected)
            image = image + own(image)
        return image


class CrossBlock(nn.Module):
    """Attention to words and a gated perceptron beside it. All heads share one key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.gated = nn.Linear(width, 2 * WIDER * width, bias=False)
        self.down = nn.Linear(WIDER * width, width, bias=False)

    def forward(self, image: Tensor, words: Tensor, selected: Tensor) -> Tensor:
        image = self.norm(image)
        key, value = self.to_kv(words).chunk(2, dim=-1)
        attended = _attend(_heads(self.to_q(image)), key, value, selected[:, None, None])
        return self.to_out(attended) + self.down(_gate(self.gated(image)))


class SelfBlock(nn.Module):
    """Attention among image tokens with rotary positions, and a gated perceptron beside it, from one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widths = (width, HEAD_WIDTH, HEAD_WIDTH, 2 * WIDER * width)
        self.norm = nn.LayerNorm(width, bias=False)
        self.fused = nn.Linear(width, sum(self.widths), bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(WIDER * width, width, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        query, key, value, gated = self.fused(self.norm(image)).split(self.widths, dim=-1)
        attended = _attend(_rotate(_heads(query)), _rotate(key), value, None)
        return self.to_out(attended) + self.down(_gate(gated))


def _heads(tokens: Tensor) -> Tensor:
    """(B, N, heads * HEAD_WIDTH) -> (B, heads, N, HEAD_WIDTH)."""
    return tokens.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, heads * HEAD_WIDTH) of queries (B, heads, N, HEAD_WIDTH) and one key and value (B, L, HEAD_WIDTH) for all heads."""
    shape = (-1, query.shape[1], -1, -1)
    key, value = key[:, None].expand(shape), value[:, None].expand(shape)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _gate(gated: Tensor) -> Tensor:
    hidden, gate = gated.chunk(2, dim=-1)
    return F.silu(gate) * hidden


def _rotate(tokens: Tensor) -> Tensor:
    """Rotary positions of tokens (..., N, HEAD_WIDTH), the two halves of a head as the two coordinates."""
    half = HEAD_WIDTH // 2
    steps = torch.arange(half, device=tokens.device, dtype=torch.float32) / half
    angles = torch.arange(tokens.shape[-2], device=tokens.device).float()[:, None] * 10000.0**-steps
    cos, sin = angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)
    first, second = tokens[..., :half], tokens[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# Published names of the cross model -> those here.
_NAMES = {
    "0.fn.norm": "0.norm",
    "0.fn.to_q": "0.to_q",
    "0.fn.to_kv": "0.to_kv",
    "0.fn.to_out": "0.to_out",
    "0.fn.ff.0": "0.gated",
    "0.fn.ff.2": "0.down",
    "1.fn.norm": "1.norm",
    "1.fn.fused_attn_ff_proj": "1.fused",
    "1.fn.attn_out": "1.to_out",
    "1.fn.ff_out.1": "1.down",
}


def modules_of(
    state: Mapping[str, Tensor], config: CLIPConfig, what: str, dtype: torch.dtype = torch.float32
) -> tuple[CLIPModel, CrossModel]:
    """CLIP and the cross model of weights under their published names, which may all start with 'mps.'.

    Raises ValueError, naming `what`, when they are not an MPS's.
    """
    clip, cross = {}, {}
    for name, tensor in state.items():
        name = name.removeprefix("mps.")
        if name.endswith(_UNUSED):
            continue
        if name.startswith("model."):
            clip[name.removeprefix("model.")] = tensor
        else:
            cross[_cross_name(name)] = tensor
    return (
        clip_of(clip, config, what, dtype),
        assemble(lambda: CrossModel(config.projection_dim), cross, what, dtype),
    )


def _cross_name(name: str) -> str:
    """'cross_model.layers.2.0.fn.to_q.weight' -> 'layers.2.0.to_q.weight'; a name of another form as it is."""
    head, _, rest = name.removeprefix("cross_model.layers.").partition(".")
    module, _, leaf = rest.rpartition(".")
    return f"layers.{head}.{_NAMES[module]}.{leaf}" if module in _NAMES else name
