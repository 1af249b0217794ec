"""Headers of safetensors files: names, types, shapes and metadata of the weights, without reading them. Imports no torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100 * 2**20
_PLAIN_TYPES = frozenset(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
"""Types whose values can be cast; eight-bit floats only where no scale goes with them."""
_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_inv|_2)?|input_scale|absmax|quant_map|nested_absmax|nested_quant_map"
    r"|SCB|weight_format|qweight|qzeros|scales|g_idx|comfy_quant|_data|_scale)$|\.quant_state\."
)
"""Names of what goes beside quantised or scaled weights: bitsandbytes, GPTQ and AWQ, quanto, ComfyUI, compressed-tensors."""
_WRAPPERS = ("_orig_mod.", "module.", "model.")
"""Starts of all names when a module around the network was saved: a compiled or distributed one, or Lightning's."""

_PREDICTIONS = {
    "v_prediction": ("v", "vpred", "v_pred", "velocity_prediction"),
    "epsilon": ("eps", "noise", "eps_prediction", "epsilon_prediction"),
    "flow": ("rectified_flow", "flow_matching", "flow_prediction"),
}
"""Prediction types, and how else the metadata of files call them."""


class ModelFileError(ValueError):
    """A file of a model that cannot be used. The message names the file and the remedy."""


@dataclass(frozen=True)
class Header:
    """Header of a safetensors file. types: safetensors' names of them, such as "BF16"."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of values of each tensor."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file of floating-point weights.

    Raises ModelFileError when the file is missing, damaged, a stand-in for another file, or holds quantised weights.
    """
    refuse_stand_in(path)
    damaged = ModelFileError(f"{path} is damaged (not a complete safetensors file); download or make it again")
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
            tree: dict[str, Any] = json.loads(file.read(length)) if length <= LONGEST_HEADER else {}
        metadata = tree.pop("__metadata__", {})
        end = max(entry["data_offsets"][1] for entry in tree.values())
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tree.items()}
        types = {name: str(entry["dtype"]) for name, entry in tree.items()}
        header = Header(path, shapes, types, dict(metadata))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise damaged from None
    if path.stat().st_size != 8 + length + end:
        raise damaged
    _refuse_quantised(header)
    return header


def refuse_stand_in(path: Path) -> None:
    """Raises ModelFileError when there is no file of weights at `path`, but nothing, an empty file, a pointer or a web page."""
    if path.is_symlink() and not path.exists():
        raise ModelFileError(f"{path} is a link to a file that is gone; download the model again")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}); correct the path or its permissions") from None
    if not start:
        raise ModelFileError(f"{path} is damaged (empty); download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ModelFileError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in that repository")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ModelFileError(f"{path} is a web page, not the weights; download the file itself")


def _refuse_quantised(header: Header) -> None:
    scale = next((name for name in header.types if _SCALES.search(name)), None)
    if scale is not None:
        raise ModelFileError(
            f"{header.path} holds quantised or scaled weights ({scale!r} goes with them); use the model's float32, bfloat16 or float16 file"
        )
    for name, kind in header.types.items():
        if name.endswith((".weight", ".bias")) and kind not in _PLAIN_TYPES:
            raise ModelFileError(
                f"{header.path} holds quantised weights ({name!r} is {kind}); use the model's float32, bfloat16 or float16 file"
            )


def wrapper_of(names: Iterable[str]) -> str:
    """The start that wrappers, one in another, gave all of the names; empty when there is none."""
    start, rest = "", list(names)
    while found := next((one for one in _WRAPPERS if rest and all(name.startswith(one) for name in rest)), ""):
        start, rest = start + found, [name.removeprefix(found) for name in rest]
    return start


def refuse_wrapper(path: Path, names: Collection[str], several_parts: bool = False) -> None:
    """Raises ModelFileError when the names are those of a wrapped module, which no loader of pipelines knows.

    several_parts: of a network with several parts, so that any start of all names is a wrapper's.
    """
    first = {name.partition(".")[0] for name in names if "." in name}
    common = f"{first.pop()}." if several_parts and len(first) == 1 and all("." in name for name in names) else ""
    if start := wrapper_of(names) or common:
        raise ModelFileError(
            f"{path} was saved from a module around the network (all names start with {start!r}); save the module inside"
        )


def stated_scheduler(header: Header) -> dict[str, Any]:
    """Fields of a scheduler's configuration that the weights themselves state: prediction type and zero terminal SNR.

    Read are the marker tensors `v_pred` and `ztsnr`, and the metadata of the modelspec standard and of sd-scripts. Raises
    ModelFileError for networks of the EDM form, whose inputs and outputs are scaled in another way.
    """
    markers = {name for name in header.shapes if "." not in name or name.startswith("edm_")}
    metadata = {name: str(value).strip().lower() for name, value in header.metadata.items()}
    prediction = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    if any(name.startswith("edm_") for name in markers) or prediction.startswith("edm"):
        raise ModelFileError(
            f"{header.path} is a network of the EDM form, which is not supported; choose an eps-, v- or flow-prediction model"
        )
    if "v_pred" in markers or metadata.get("ss_v_parameterization") == "true":
        prediction = "v"
    names = {each: name for name, same in _PREDICTIONS.items() for each in (name, *same)}
    prediction = re.sub(r"[\s-]+", "_", prediction)
    if prediction and prediction not in names:
        raise ModelFileError(
            f"{header.path} states prediction type {prediction!r}, which is not supported; choose an eps-, v- or flow-prediction model"
        )
    stated: dict[str, Any] = {"prediction_type": names[prediction]} if prediction else {}
    if "ztsnr" in markers or metadata.get("ss_zero_terminal_snr") == "true":
        stated["rescale_betas_zero_snr"] = True
    return stated
