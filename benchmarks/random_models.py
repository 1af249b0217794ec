"""Model folders with random weights, of the size of published models: cost does not depend on what a network has learned.

Weights are drawn shard by shard on the device that will train, so that a network is never whole in memory while it is made. The folders
are a pipeline's usual files: what reads them is what reads real ones. Tokenizers and noise schedules are the demo's, with the published
length.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flashdmd_ray.catalog import published
from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.demo import weights_path
from flashdmd_ray.plan.measure.networks import build_sam

Json = Mapping[str, Any]
SHARD = 2**30
"""Bytes of a weights file, and the most of a network that is in memory while it is made."""


@dataclass(frozen=True)
class Sizes:
    """Architectures as in each model's config.json. sam, reward: None for those of the demo."""

    family: str
    denoiser: Json
    vae: Json
    text: Json
    text_2: Json
    sam: Json | None = None
    reward: Json | None = None


def _demo(family: str) -> Sizes:
    """The sizes of the demo's teacher."""
    folder = weights_path(str(FAMILIES[family].demo))
    parts = (FAMILIES[family].denoiser, "vae", "text_encoder", "text_encoder_2")
    denoiser, vae, text, text_2 = (json.loads((folder / part / "config.json").read_text()) for part in parts)
    return Sizes(family, denoiser, vae, text, text_2)


_SAM, _REWARD = published.SAM["vit_b"].config, published.PICKSCORE.config
SIZES = {
    "sdxl": Sizes(
        "sdxl",
        published.SDXL_UNET.config,
        published.VAE.config,
        published.CLIP_L.config,
        published.CLIP_BIG_G.config,
        _SAM,
        _REWARD,
    ),
    "sd3_medium": Sizes(
        "sd3",
        published.SD3_MEDIUM.config,
        published.VAE_16.config,
        published.CLIP_L_PROJECTED.config,
        published.CLIP_BIG_G.config,
        _SAM,
        _REWARD,
    ),
    "tiny_sdxl": _demo("sdxl"),
    "tiny_sd3": _demo("sd3"),
}


def write_models(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Write the models of that size below `folder`, unless they are there; returns the configuration keys that name them."""
    sizes = SIZES[name]
    done = folder / f"{name}.json"
    if not done.is_file():
        torch.manual_seed(0)
        write = partial(_write, dtype=dtype, device=device)
        _write_teacher(sizes, folder / "teacher", write)
        sam, reward = weights_path("sam"), weights_path("reward")
        if sizes.sam is not None:
            sam = folder / "sam_vit_b_random.pth"
            _write_sam(sizes.sam, sam)
        if sizes.reward is not None:
            reward = folder / "reward"
            write(partial(CLIPModel, CLIPConfig(**_without_class(sizes.reward))), reward)
            _write_processors(sizes.reward, reward)
        write_images(folder / "images", 8 * int(sizes.denoiser["sample_size"]))
        named: dict[str, Any] = {
            "model.teacher": str(folder / "teacher"),
            "model.vae": None,
            "model.sam": str(sam),
            "rewards": [{"kind": "pickscore", "path": str(reward)}],
            "data.source": str(folder / "images"),
        }
        done.write_text(json.dumps(named))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def write_images(folder: Path, side: int, count: int = 16) -> None:
    """Captioned square images of colour gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        corners = torch.randint(256, (4, 4, 3), dtype=torch.uint8).numpy()
        Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"colour gradient {number}")


def _write_teacher(sizes: Sizes, folder: Path, write: Any) -> None:
    entry = FAMILIES[sizes.family]
    network = {"sdxl": UNet2DConditionModel, "sd3": SD3Transformer2DModel}[sizes.family]
    write(partial(network.from_config, dict(sizes.denoiser)), folder / entry.denoiser)
    write(partial(AutoencoderKL.from_config, {**sizes.vae, "force_upcast": False}), folder / "vae")
    projected = "text_encoder" in entry.pooled_encoders
    first = CLIPTextModelWithProjection if projected else CLIPTextModel
    write(partial(first, _text_config(sizes.text)), folder / "text_encoder")
    write(partial(CLIPTextModelWithProjection, _text_config(sizes.text_2)), folder / "text_encoder_2")
    demo = weights_path(str(entry.demo))
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer(sizes.text).save_pretrained(folder / name)
    shutil.copytree(demo / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    (folder / "model_index.json").write_text((demo / "model_index.json").read_text())


def _write(build: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Write configuration and random weights of the module that `build` makes on the meta device."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        module: nn.Module = build()
    stem = "diffusion_pytorch_model" if hasattr(module, "save_config") else "model"
    if hasattr(module, "save_config"):
        module.save_config(folder)
    elif hasattr(module, "config"):
        module.config.save_pretrained(folder)
    shards = list(_shards(module, dtype))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        state = module.state_dict()
        save_file({name: draw(name, state[name], dtype, device) for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / f"{stem}.safetensors.index.json").write_text(text)


def _shards(module: nn.Module, dtype: torch.dtype) -> Iterator[list[str]]:
    """Names of the module's weights, as many at a time as fit a file."""
    names: list[str] = []
    room = SHARD
    for name, tensor in module.state_dict().items():
        size = tensor.numel() * dtype.itemsize
        if names and size > room:
            yield names
            names, room = [], SHARD
        names.append(name)
        room -= size
    yield names


def draw(name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight as networks start with it: ones for scales of norms, zeros for biases, else normal with 1 / (3 fan-in) as variance."""
    if not like.is_floating_point():
        return torch.arange(like.numel()).view(like.shape)  # position ids
    if like.ndim < 2:
        value = 1.0 if name.endswith("weight") else 0.0
        return torch.full(like.shape, value, dtype=dtype)
    deviation = (3 * like[0].numel()) ** -0.5
    return torch.empty(like.shape, dtype=dtype, device=device).normal_(0.0, deviation).cpu()


def _without_class(config: Json) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "architectures"}


def _text_config(sizes: Json) -> CLIPTextConfig:
    words = _tokenizer(sizes)
    tokens = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return CLIPTextConfig(**_without_class(sizes) | tokens)


def _tokenizer(text: Json) -> CLIPTokenizer:
    """The demo's tokenizer, for prompts as long as the text encoder reads."""
    length = text["max_position_embeddings"]
    return CLIPTokenizer.from_pretrained(weights_path("teacher"), subfolder="tokenizer", model_max_length=length)


def _write_processors(reward: Json, folder: Path) -> None:
    """The tokenizer and the image processor of a CLIP reward."""
    _tokenizer(reward["text_config"]).save_pretrained(folder)
    side = reward["vision_config"]["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)


def _write_sam(sizes: Json, file: Path) -> None:
    """Segment Anything's image encoder in the official layout, which is for images of 1024 pixels."""
    with torch.device("meta"):
        weights = build_sam(sizes, 1024).state_dict()
    cpu = torch.device("cpu")
    torch.save({f"image_encoder.{name}": draw(name, like, torch.float32, cpu) for name, like in weights.items()}, file)
