"""Weights of a few-step student that exists already, as the start of the generator: an export, a network's file, or a LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.headers import Header, ModelFileError, read_header
from flashdmd_ray.models.locations import HubPath
from flashdmd_ray.models.single_file import LORA_NAME
from flashdmd_ray.models.state_dicts import check_layout, find_file, read_weights
from flashdmd_ray.models.stock_modules import load_module, load_part
from flashdmd_ray.models.weight_reading import weights_device

_MATRIX = re.compile(
    r"(?P<layer>.+?)\.(((?P<down>lora_A|lora\.down)|(?P<up>lora_B|lora\.up))(\.[\w-]+)?\.(weight|bias)|lora_magnitude_vector(\..+)?)"
)
"""Names of the matrices of an adapted layer, as diffusers calls them."""
_OLDER = re.compile(r"\.processor\.(\w+)_lora")
"""Names of attention layers in older versions, which kohya's are still turned into."""


def load_start(family: Family, path: str) -> dict[str, Tensor]:
    """Float32 weights, by the names of the family's stock network, of the student at `path`.

    path: a pipeline's directory or hub id, such as an export of this project or SDXL-Turbo; a file of the network's weights under
    diffusers' names, such as those of DMD2 and SDXL-Lightning; or a .safetensors file with a LoRA, such as LCM's, which is merged into the
    teacher. A file may lie in a repository: owner/name/file.
    Raises ValueError, one line naming `generator.start`, for anything else and for weights of another network.
    """
    network = family.denoiser().network
    try:
        file = _file(path)
        if file is None:
            state = load_module(type(network), path, FAMILIES[family.name].denoiser, torch.float32).state_dict()
        elif is_lora(file):
            load_part(path, "the LoRA", lambda: merge_lora(family, network, str(file)))
            state = network.state_dict()
        else:
            state = read_weights(file)
        check_layout(network, state, path)
    except ValueError as error:
        raise ValueError(f"generator.start: {error}") from error
    return {name: value.float() for name, value in state.items()}


def _file(path: str) -> Path | None:
    """The file that `path` names, here or in a hub repository; None for a directory or a repository as a whole."""
    hub = HubPath.parse(path)
    in_repository = hub is not None and Path(hub.inside).suffix in (".safetensors", ".bin", ".pt", ".pth")
    return Path(path) if Path(path).is_file() else find_file(path, ()) if in_repository else None


def is_lora(file: Path) -> bool:
    """Return True for a safetensors file with matrices of low-rank adapters."""
    if file.suffix != ".safetensors":
        return False
    header: Header = load_part(str(file), "", lambda: read_header(file))
    return any(LORA_NAME.search(name) for name in header.shapes)


def merge_lora(family: Family, network: ModelMixin, path: str) -> None:
    """Add the LoRA in a file, under the names of diffusers or kohya, to `network` in place.

    Raises ModelFileError for one that also changes text encoders, which are the teacher's here, and for one of another network.
    """
    pipeline: Any = family.pipeline_class
    found = pipeline.lora_state_dict(path, unet_config=network.config)
    state, alphas = found if isinstance(found, tuple) else (found, None)
    if any(name.startswith("text_encoder") for name in state):
        raise ModelFileError(
            "it changes text encoders too, which stay the teacher's here; choose one of the network alone"
        )
    start = f"{FAMILIES[family.name].denoiser}."
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    state = {name if name.startswith(start) else f"{start}{name}": tensor for name, tensor in plain.items()}
    _check_layers(network, {name.removeprefix(start): tuple(tensor.shape) for name, tensor in state.items()})
    if weights_device().type == "meta":
        return
    if FAMILIES[family.name].denoiser == "unet":
        pipeline.load_lora_into_unet(state, alphas, network)
    else:
        pipeline.load_lora_into_transformer(state, network)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()


def _check_layers(network: ModelMixin, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ModelFileError unless all weights are pairs of matrices, down and up, that fit layers of the network.

    The libraries pass over weights that they do not know: such a LoRA would do nothing, or half of what it does.
    """
    layers = dict(network.named_modules())
    ranks: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        match = _MATRIX.fullmatch(_OLDER.sub(r".\1.lora", name).replace(".to_out.lora", ".to_out.0.lora"))
        weight = None if match is None else getattr(layers.get(match["layer"]), "weight", None)
        if match is None or weight is None:
            what = "changes a layer that this teacher has not" if match else "is no matrix of a low-rank adapter"
            raise ModelFileError(f"{name!r} {what}: it is of another model, or another form; choose a LoRA of this one")
        side = (match["down"] and "down") or (match["up"] and "up")
        if not side:  # the magnitudes of DoRA, a bias
            continue
        ranks.setdefault(match["layer"], {})[side] = shape[0 if side == "down" else 1]
        own, wanted = (shape[1], weight.shape[1]) if side == "down" else (shape[0], weight.shape[0])
        if own != wanted:
            raise ModelFileError(
                f"{name!r} is {shape}, the layer {tuple(weight.shape)}: it is of another model; choose a LoRA of this one"
            )
    for layer, found in ranks.items():
        if found.get("down") != found.get("up"):
            raise ModelFileError(
                f"the two matrices of layer {layer!r} do not fit each other ({found}); download it again"
            )
