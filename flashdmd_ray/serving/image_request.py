"""Fields of POST /v1/images/generations, and the job that a model makes of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flashdmd_ray.config import suggestion
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.messages import SEEDS, ImageJob, ModelInfo, parse_size, size_text
from flashdmd_ray.serving.settings import LimitSettings

QUALITY = 90
"""Quality of WebP and JPEG where `output_compression` is not given."""
RANDOM_SEEDS = 2**32
"""Bound of random seeds: exact in JavaScript's numbers too."""


def _whole(value: Any) -> Any:
    """Take 4.0 for 4, since JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _boolean(value: Any) -> Any:
    """Refuse 0 and 1, which Python does not tell from False and True; JSON does."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


Whole = BeforeValidator(_whole)
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class ImageRequest(BaseModel):
    """OpenAI's request, and the extensions that diffusion servers share: seed, num_inference_steps, guidance_scale, negative_prompt.

    A field that this service has no use for is accepted with the value that means nothing, and refused with any other.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    prompt: Annotated[str, Field(strict=True, min_length=1)]
    """Text of the images."""
    model: str | None = None
    """A name of GET /v1/models; null is the default model."""
    n: Annotated[int, Field(strict=True, ge=1), Whole] | None = 1
    """Images; image i is the one of `seed + i`."""
    size: str | None = "auto"
    """WIDTHxHEIGHT in pixels; auto is the size the model was trained at."""
    seed: Annotated[int, Field(strict=True, ge=-1, lt=SEEDS), Whole] | None = None
    """Same model version, prompt, size, steps and seed: same bytes. null and -1 take a random one; the response says which."""
    num_inference_steps: Annotated[int, Field(strict=True, ge=1), Whole] | None = None
    """Denoising steps; null is what the model was trained for."""
    response_format: Literal["b64_json"] | None = "b64_json"
    """Images come in the response; the service stores none, so there are no URLs."""
    output_format: Literal["png", "webp", "jpeg"] | None = "png"
    output_compression: Annotated[int, Field(strict=True, ge=0, le=100), Whole] | None = None
    """Quality of webp and jpeg, 100 is best; png has no loss and takes none but 100."""
    user: Annotated[str, Field(max_length=256)] | None = None
    """Name of the client's user; not used."""
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    """Successor of `user`; not used."""
    negative_prompt: Literal[""] | None = None
    """Few-step students have no guidance that a negative prompt could act on."""
    guidance_scale: Number | None = None
    """Students have none (0 or 1); of a teacher, its own."""
    quality: Literal["auto", "standard", "medium", "high", "hd", "low"] | None = "auto"
    """Not used: there is one."""
    background: Literal["auto", "opaque"] | None = "auto"
    moderation: Literal["auto", "low"] | None = "auto"
    """Not used: the operator's filters hold."""
    style: Literal["vivid", "natural"] | None = None
    """Not used."""
    stream: Annotated[Literal[False], BeforeValidator(_boolean)] | None = False
    """Images come all at once."""
    partial_images: Annotated[int, Field(strict=True, ge=0, le=0), Whole] | None = None


HINTS = {
    "response_format": "the service stores no images, so it has no URLs to give; use 'b64_json'",
    "negative_prompt": "a few-step student has no guidance that a negative prompt could act on; leave it out",
    "stream": "images come all at once; leave it out",
    "partial_images": "images come all at once; leave it out",
    "background": "images have no transparency; leave it out",
}

_NUMBER = ("int_type", "float_type")
"""Kinds of errors about a value that is no number."""

OTHER_NAMES = {
    "num_inference_steps": ("steps", "num_steps", "inference_steps", "sampling_steps", "sample_steps"),
    "guidance_scale": ("cfg_scale", "cfg", "guidance", "text_guidance_scale"),
    "size": ("width", "height", "image_size", "resolution", "aspect_ratio"),
    "n": ("num_images", "num_images_per_prompt", "num_outputs", "batch_size", "batch_count", "n_iter", "samples"),
    "seed": ("random_seed", "manual_seed", "noise_seed"),
    "negative_prompt": ("negative", "uc"),
    "prompt": ("input", "inputs", "text", "positive_prompt", "text_prompts"),
    "model": ("model_id", "model_name", "sd_model_checkpoint", "override_settings"),
    "output_format": ("format", "image_format"),
}
"""Name here -> names of the same field in other image APIs (diffusers, Stable Diffusion WebUI, Stability, Replicate)."""
NO_SUCH_THING = {
    "one sampler belongs to each model": ("sampler", "sampler_name", "sampler_index", "scheduler"),
    "images are made from text alone": ("image", "init_image", "init_images", "mask", "strength", "denoising_strength"),
    "its fields belong in the body itself": ("extra_body", "parameters", "options", "extra"),
}
"""Reason -> names of fields of other image APIs that have nothing to mean here."""


def parse_request(tree: Mapping[str, Any], limits: LimitSettings) -> ImageRequest:
    """Check the fields of a body. Raises ApiError (400) with the first field that is wrong as its `param`."""
    try:
        request = ImageRequest.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None
    if len(request.prompt) > limits.prompt_characters:
        raise invalid("prompt", f"is {len(request.prompt)} characters long; at most {limits.prompt_characters}")
    if not request.prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in request.prompt):
        raise invalid("prompt", "holds half of a surrogate pair, which is no character")
    return request


def _explain(error: ValidationError) -> ApiError:
    # An unknown name explains more than a missing or wrong value.
    detail = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    field = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        shown = field if len(field) <= 100 else field[:100] + "..."
        return ApiError(400, f"Unknown parameter: '{shown}'{_hint(field[:100])}", "unknown_parameter", shown)
    if detail["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{field}'.", "missing_required_parameter", field)
    quoted = (
        "; write the number without quotes" if detail["type"] in _NUMBER and isinstance(detail["input"], str) else ""
    )
    return invalid(field, HINTS.get(field, detail["msg"][0].lower() + detail["msg"][1:] + quoted))


def _hint(name: str) -> str:
    """Say how an unknown field is called here, or why there is none."""
    for ours, others in OTHER_NAMES.items():
        if name.lower() in others:
            written = "'size': \"WIDTHxHEIGHT\"" if ours == "size" else f"'{ours}'"
            return f", which is {written} here"
    for reason, others in NO_SUCH_THING.items():
        if name.lower() in others:
            return f": {reason}; leave it out"
    return suggestion(name, list(ImageRequest.model_fields))


def invalid(field: str, reason: str) -> ApiError:
    """Make the answer to a field with a wrong value."""
    return ApiError(400, f"Invalid '{field}': {reason}.", "invalid_value", field)


def make_job(
    request: ImageRequest,
    model: ModelInfo,
    client: str,
    limits: LimitSettings,
    timeout_s: float,
    random: Callable[[], int],
) -> ImageJob:
    """Make the job of a client's request. random() -> a seed, where it has none. Raises ApiError (400) for what `model` cannot do."""
    size = model.sizes[0] if request.size in (None, "auto") else parse_size(str(request.size))
    if size not in model.sizes:
        raise invalid("size", f"{model.name} draws {', '.join(map(size_text, model.sizes))}")
    steps = request.num_inference_steps or model.steps[0]
    if steps not in model.steps:
        raise invalid("num_inference_steps", f"{model.name} takes {_listed(model.steps)}")
    count, limit = request.n or 1, max_images(model, limits)
    if count > limit:
        raise invalid("n", f"at most {limit} images of {model.name} per request")
    if request.guidance_scale is not None and request.guidance_scale not in guidances(model):
        use = "a few-step student has no guidance; use 0 or 1, or leave it out"
        raise invalid(
            "guidance_scale", use if model.kind == "student" else f"{model.name} has {model.guidance_scale:g}"
        )
    image_format = request.output_format or "png"
    if image_format == "png" and request.output_compression not in (None, 100):
        raise invalid("output_compression", "png has no loss; use webp or jpeg, or leave it out")
    first = random() if request.seed in (None, -1) else request.seed
    seeds = tuple((first + i) % SEEDS for i in range(count))
    quality = QUALITY if request.output_compression is None else request.output_compression
    return ImageJob(client, model.name, request.prompt, seeds, steps, size, image_format, quality, timeout_s)


def cost(job: ImageJob, model: ModelInfo) -> float:
    """Return how many images a job counts as: by forwards, in images of a student in its trained number of steps."""
    return len(job.seeds) * job.steps * model.cost_per_step


def random_seed() -> int:
    """Return a random seed."""
    return secrets.randbelow(RANDOM_SEEDS)


def guidances(model: ModelInfo) -> tuple[float, ...]:
    """List the values of guidance_scale that mean what the model does anyway."""
    return (0.0, 1.0) if model.guidance_scale is None else (model.guidance_scale,)


def max_images(model: ModelInfo, limits: LimitSettings) -> int:
    """Return how many images a request may ask for, at any of the model's sizes."""
    largest = max(height * width for height, width in model.sizes)
    return min(limits.images, limits.pixels // largest)


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, sorted(numbers))
    return f"{', '.join(first)} or {last}" if first else last
