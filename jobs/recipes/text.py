"""Tokenizer and the teacher's two text towers, pre-trained to state every attribute and then frozen.

Text towers that train jointly with a small diffusion model never learn which colour belongs to which digit in the time
a small model has. Here a linear read-out of the pooled embedding must name every attribute of a caption; the towers
learn that in a minute and are frozen for everything after.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flashdmd_ray.demo.scenes import BACKGROUNDS, COLOURS, RELATIONS, SceneAttributes, sample_scenes
from recipes.training import Plan, fit

PLAN = Plan(steps=1200, learning_rate=2e-3, seed=21)
BATCH = 256
MAX_LENGTH = 16  # the longest caption has 12 words, plus start and end
_START, _END = "<|startoftext|>", "<|endoftext|>"
_POOL = 30_000


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learnt on the grammar's words, so that each of them is one token.

    Other words fall apart into letters. The merges are learnt here because the tokenizers library numbers its tokens
    differently in every process.
    """
    words = ["a", "on", "background", *COLOURS, *BACKGROUNDS, *" ".join(RELATIONS).split(), *string.digits]
    merges = _learn_merges(words)
    letters = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase + string.digits)]
    tokens = [_START, _END, *letters, *(first + second for first, second in merges)]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=MAX_LENGTH,
    )
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"the word {word!r} is not one token")
    return tokenizer


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every word one token: the most frequent pair first, ties by the alphabet."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in dict.fromkeys(words)]
    merges: list[tuple[str, str]] = []
    while any(len(parts) > 1 for parts in split):
        counts = Counter(pair for parts in split for pair in pairwise(parts))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = [_merge(parts, best) for parts in split]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=projection,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(B, MAX_LENGTH) int64 token ids, padded and truncated as the pipelines do."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def attribute_labels(attributes: list[SceneAttributes]) -> torch.Tensor:
    """(B, 6) int64: first digit, first colour, relation, second digit, second colour, background; -100 = absent.

    The relation of a single digit is class 4.
    """
    colours, backgrounds, relations = list(COLOURS), list(BACKGROUNDS), list(RELATIONS)
    rows = []
    for item in attributes:
        first = item.digits[0]
        second = item.digits[1] if item.relation is not None else None
        rows.append(
            [
                first.digit,
                colours.index(first.colour),
                relations.index(item.relation) if item.relation is not None else len(relations),
                second.digit if second else -100,
                colours.index(second.colour) if second else -100,
                backgrounds.index(item.background),
            ]
        )
    return torch.tensor(rows)


# Classes of each column of `attribute_labels`.
ATTRIBUTE_SIZES = (10, len(COLOURS), len(RELATIONS) + 1, 10, len(COLOURS), len(BACKGROUNDS))


def readout_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the attributes' cross-entropies: logits (B, sum of ATTRIBUTE_SIZES), labels (B, 6)."""
    parts = zip(logits.split(ATTRIBUTE_SIZES, dim=1), labels.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(output, target) for output, target in parts]).sum()


class _Readout(nn.Module):
    """A text tower and one linear read-out of all attributes from its pooled embedding."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(width, sum(ATTRIBUTE_SIZES))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.tower(input_ids=ids)
        pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
        return self.head(pooled)


def train(
    work: Path, plan: Plan = PLAN
) -> tuple[CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection, dict[str, float]]:
    """Train both towers; return them with their tokenizer and the share of held-out captions whose every attribute is read right."""
    tokenizer = build_tokenizer()
    torch.manual_seed(plan.seed)
    one = CLIPTextModel(text_config(tokenizer, 64, 3, 64))
    two = CLIPTextModelWithProjection(text_config(tokenizer, 96, 3, 96))
    train_scenes = [s.attributes for s in sample_scenes(_POOL, "train", plan.seed)]
    held_out = [s.attributes for s in sample_scenes(2000, "held_out", plan.seed)]
    ids, labels = tokenize(tokenizer, [a.caption for a in train_scenes]), attribute_labels(train_scenes)
    held_ids, held_labels = tokenize(tokenizer, [a.caption for a in held_out]), attribute_labels(held_out)
    metrics = {"seconds": 0.0}
    for name, tower, width in (("text_encoder", one, 64), ("text_encoder_2", two, 96)):
        model = _Readout(tower, width)

        def loss_of(step: int, generator: torch.Generator, model: _Readout = model) -> torch.Tensor:
            index = torch.randint(_POOL, (BATCH,), generator=generator)
            return readout_loss(model(ids[index]), labels[index])

        metrics["seconds"] += fit(name, model, loss_of, plan, work)
        with torch.no_grad():
            outputs = model(held_ids).split(ATTRIBUTE_SIZES, dim=1)
        right = [(o.argmax(1) == t) | (t == -100) for o, t in zip(outputs, held_labels.unbind(1), strict=True)]
        metrics[f"{name}_held_out_accuracy"] = float(torch.stack(right).all(0).float().mean())
    normalise_pooled(two, ids[:4096])
    return tokenizer, one.eval(), two.eval(), metrics


@torch.no_grad()
def normalise_pooled(tower: CLIPTextModelWithProjection, ids: torch.Tensor) -> None:
    """Scale the projection so that pooled embeddings have unit mean square: the size the U-Net's layers expect."""
    pooled = tower(input_ids=ids).text_embeds
    tower.text_projection.weight /= pooled.pow(2).mean().sqrt()


def declare_float32(config_file: Path) -> None:
    """Make transformers load half-precision weights as float32."""
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
