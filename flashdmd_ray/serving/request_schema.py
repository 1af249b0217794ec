"""JSON schema of the image request, for the models that are loaded now."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from flashdmd_ray.serving.image_request import ImageRequest, guidances, max_images
from flashdmd_ray.serving.messages import ModelInfo, size_text
from flashdmd_ray.serving.settings import LimitSettings


def request_schema(models: Sequence[ModelInfo], default: str, limits: LimitSettings) -> dict[str, Any]:
    """Describe exactly the bodies that are accepted now: one alternative for each model and kind of format."""
    plain = ImageRequest.model_json_schema()
    plain["properties"]["prompt"]["maxLength"] = limits.prompt_characters
    alternatives = []
    for model in models:
        names: list[str | None] = [model.name, *model.aliases]
        for lossless in (True, False):
            alternatives.append(_alternative(plain, model, names, lossless, model.name == default, limits))
    return {"anyOf": alternatives}


def _alternative(
    plain: Mapping[str, Any],
    model: ModelInfo,
    names: list[str | None],
    lossless: bool,
    is_default: bool,
    limits: LimitSettings,
) -> dict[str, Any]:
    schema = copy.deepcopy(dict(plain))
    schema["title"] = f"{model.name}, {'png' if lossless else 'webp or jpeg'}"
    fields, required = schema["properties"], ["prompt"]
    formats = ["png", None] if lossless else ["webp", "jpeg"]
    allowed: dict[str, list[Any]] = {
        "model": [*names, None] if is_default else names,
        "size": [*map(size_text, model.sizes), "auto", None],
        "num_inference_steps": [*sorted(model.steps), None],
        "guidance_scale": [*guidances(model), None],
        "output_format": formats,
    }
    if lossless:
        allowed["output_compression"] = [100, None]
    else:
        required.append("output_format")
    if not is_default:
        required.append("model")
    for name, values in allowed.items():
        texts = {key: fields[name][key] for key in ("title", "description") if key in fields[name]}
        fields[name] = {"enum": values} | texts
    fields["n"]["anyOf"][0]["maximum"] = max_images(model, limits)
    return schema | {"required": required}
