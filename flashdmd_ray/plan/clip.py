"""The cost of CLIP-form transformers in closed form: text encoders and rewards in PickScore's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashdmd_ray.plan.costs import Line, Use
from flashdmd_ray.plan.models import Model

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


def clip_score(model: Model, image: tuple[int, int] | None) -> Use | None:
    """A score of one image of `image` pixels and its prompt, without gradients, in float32; None when the model is unknown.

    Bytes: the image in its original size through clamping and scaling, or one layer's tokens with their widened copy, whichever is more.
    """
    config = model.config or {}
    if image is None or "vision_config" not in config or "text_config" not in config:
        return None
    vision, text = config["vision_config"], config["text_config"]
    if "hidden_size" not in vision or "hidden_size" not in text:  # written as differences from defaults
        return None
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    embedding = 2.0 * patches * vision["hidden_size"] * 3 * vision["patch_size"] ** 2
    flops = embedding + tower_flops(vision, patches + 1) + tower_flops(text, text["max_position_embeddings"])
    layer = 4.0 * (patches + 1) * (4 * vision["hidden_size"] + 2 * vision["intermediate_size"])
    peak = max(3.0 * PIXEL_BYTES * image[0] * image[1], layer)
    return Use(Line(0.0, flops), Line(0.0, 0.0), Line(0.0, peak))
