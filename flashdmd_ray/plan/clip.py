"""The cost of CLIP-form transformers in closed form: text encoders and rewards on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdmd_ray.catalog.rewards import REWARDS
from flashdmd_ray.plan.costs import Line, Use
from flashdmd_ray.plan.models import Model

LAUNCHES = 20
"""Kernels of a transformer layer without gradients, roughly."""
PIXEL_BYTES = 3 * 4
"""Of one pixel of a float32 image."""


def text_flops(text: Model) -> float:
    """Operations of a text encoder on one prompt, which is filled up to the encoder's length."""
    config = text.config or {}
    if "d_model" in config:  # T5: gated activations, and heads that may be wider than the model
        width, attention = config["d_model"], config["num_heads"] * config["d_kv"]
        layer = 4 * width * attention + 3 * width * config["d_ff"]
        return 256 * config["num_layers"] * (2.0 * layer + 4.0 * 256 * attention)
    return tower_flops(config, config["max_position_embeddings"]) if "hidden_size" in config else 0.0


def tower_flops(tower: Mapping[str, Any], tokens: int) -> float:
    """Operations of one sequence: four projections, two layers of a perceptron and attention in each layer."""
    width, layers = tower["hidden_size"], tower["num_hidden_layers"]
    layer = 4 * width * width + 2 * width * tower["intermediate_size"]
    return float(layers * tokens * (2 * layer + 4 * tokens * width))


def reward_use(kind: str, model: Model, image: tuple[int, int] | None) -> Use | None:
    """A reward of one image of `image` pixels and its prompt, without gradients, in float32; None when the model is unknown.

    Bytes: the image in its original size through clamping and scaling, or one layer's tokens with their widened copy, whichever is more.
    """
    if REWARDS[kind].path_is == "url":
        return Use(*[Line(0.0, 0.0)] * 4)
    config = model.config or {}
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    reads = "text_config" in config
    if (
        image is None or "hidden_size" not in vision or (reads and "hidden_size" not in text)
    ):  # differences from defaults
        return None
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    embedding = 2.0 * (tokens - 1) * vision["hidden_size"] * 3 * vision["patch_size"] ** 2
    flops = embedding + tower_flops(vision, tokens)
    if reads:
        words = text["max_position_embeddings"]
        flops += tower_flops(text, words) + _between(config, tokens, words)
    layer = 4.0 * tokens * (4 * vision["hidden_size"] + 2 * vision["intermediate_size"])
    peak = max(3.0 * PIXEL_BYTES * image[0] * image[1], layer)
    once = tower_flops(text, text["max_position_embeddings"]) if "cross_layers" in config else 0.0  # its condition
    layers = vision["num_hidden_layers"] + (text["num_hidden_layers"] if reads else 0)
    return Use(Line(once, flops), Line(0.0, 0.0), Line(0.0, peak), Line(float(LAUNCHES * layers), 0.0))


def _between(config: Mapping[str, Any], tokens: int, words: int) -> float:
    """Attention between image and text: ImageReward's in every text layer, MPS's cross model."""
    text = config["text_config"]
    if width := text.get("encoder_hidden_size"):
        own, layers = text["hidden_size"], text["num_hidden_layers"]
        layer = 2 * words * own * own + 2 * tokens * width * own
        return float(layers * (2 * layer + 4 * words * tokens * own))
    if layers := config.get("cross_layers"):
        width, head = config["projection_dim"], 64
        cross = tokens * (2 * width + 12 * width) * width + words * 2 * head * width
        own = tokens * (2 * width + 12 * width + 2 * head) * width
        return float(layers * (2 * (cross + own) + 4 * tokens * (words + tokens) * width))
    return 0.0
