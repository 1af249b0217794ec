"""All weights of a teacher in one file of the original layout: which belong to what, and what the file states. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.catalog.families import FamilyEntry
from flashdmd_ray.models.headers import Header, ModelFileError, read_header, refuse_wrapper, stated_scheduler

DENOISER, VAE = "denoiser", "vae"
"""Parts of a teacher; the text encoders are called as their folders."""
DENOISER_STARTS, VAE_STARTS = ("model.diffusion_model.",), ("first_stage_model.", "vae.")
_UNUSED = re.compile(
    r"(model_ema|embedding_manager|loss)\.|.*\.(position_ids|logit_scale)$|(first_stage_model|vae)\.(loss|model_ema)\."
    r"|denoiser\.sigmas$|(sqrt_|log_one_minus_|posterior_)?[a-z_]*(alphas|betas|variance|coef[12])\w*$|logvar$|scale_factor$|v_pred$|ztsnr$|edm_"
)
"""Weights that were saved with the others and are not part of the network: averages, schedules, markers."""
LORA_NAME = re.compile(r"^lora_|\.lora_(A|B|up|down|mid)\.|_lora\.(down|up)\.|\.(hada|lokr)_|\.dora_scale$")
"""Names of the matrices of low-rank adapters."""


def teacher_starts(family: FamilyEntry, t5: bool, own_vae: bool) -> dict[str, tuple[str, ...]]:
    """Part -> how the names of its weights start, for the parts that are loaded."""
    encoders = {**family.text_encoders, **(family.optional_encoders if t5 else {})}
    starts = {DENOISER: DENOISER_STARTS, VAE: VAE_STARTS} | {part: (start,) for part, start in encoders.items()}
    return starts if own_vae else {part: start for part, start in starts.items() if part != VAE}


def read_single_file(path: Path, family: FamilyEntry) -> Header:
    """The header of a teacher's file. Raises ModelFileError when it is damaged, quantised, or not a whole model of the family's layout."""
    header = read_header(path)
    names = list(header.shapes)
    if not any(name.startswith(DENOISER_STARTS) for name in names):
        refuse_wrapper(path, names)
    if any(LORA_NAME.search(name) for name in names):
        raise ModelFileError(
            f"{path} is a LoRA, weights that are added to a model; name the model, or one that it is merged into"
        )
    if any(name.startswith(("down_blocks.", "transformer_blocks.", "text_model.")) for name in names):
        raise ModelFileError(
            f"{path} holds one module in diffusers' or transformers' layout; put it beside its config.json into a pipeline directory"
        )
    known = (*DENOISER_STARTS, *VAE_STARTS, *family.text_encoders.values(), *family.optional_encoders.values())
    foreign = next((name for name in names if not name.startswith(known) and not _UNUSED.match(name)), None)
    if foreign is not None and any(name.startswith(DENOISER_STARTS) for name in names):
        raise ModelFileError(
            f"{path} holds weights that are of no part of the family, first {foreign!r}; choose another file"
        )
    return header


def part_names(header: Header, starts: Sequence[str]) -> list[str]:
    """Names of the weights of one part, without those that are not part of the network."""
    return [name for name in header.shapes if name.startswith(tuple(starts)) and not _UNUSED.match(name)]


def part_size(header: Header, starts: Sequence[str]) -> int:
    """The number of values of one part."""
    sizes = header.sizes
    return sum(sizes[name] for name in part_names(header, starts))


def vae_file(path: Path) -> tuple[Header, int]:
    """The header of a VAE in one file, and the channels of its latents. Raises ModelFileError when it is none."""
    header = read_header(path)
    refuse_wrapper(path, header.shapes)
    known = [f"{start}decoder.conv_in.weight" for start in ("", *VAE_STARTS)]
    name = next((name for name in known if name in header.shapes), None)
    if name is None or len(header.shapes[name]) != 4:
        raise ModelFileError(f"{path} holds no VAE (no weight is called decoder.conv_in.weight); choose another file")
    return header, header.shapes[name][1]


def scheduler_of(config: Mapping[str, Any], header: Header) -> dict[str, Any]:
    """A scheduler's configuration with what the denoiser's weights state themselves.

    Raises ModelFileError when the two contradict each other and the weights do not settle it.
    """
    stated = stated_scheduler(header)
    flow = "shift" in config and "beta_schedule" not in config
    own = "flow" if flow else config.get("prediction_type", "epsilon")
    prediction = stated.get("prediction_type", own)
    if prediction != own and (prediction != "v_prediction" or flow):
        raise ModelFileError(
            f"{header.path} states that it predicts {prediction}, its scheduler's configuration says {own}; choose the configuration "
            "of a model that predicts the same"
        )
    return {**config, **({} if flow else stated)}


def refuse_contradiction(config: Mapping[str, Any], header: Header) -> None:
    """Raises ModelFileError when a directory's weights state another scheduler than its scheduler_config.json."""
    is_flow = "shift" in config and "beta_schedule" not in config
    own = {"prediction_type": "flow" if is_flow else config.get("prediction_type", "epsilon")}
    for key, value in stated_scheduler(header).items():
        if own.get(key, config.get(key, False)) != value:
            raise ModelFileError(
                f'{header.path} states {key} {value}, scheduler_config.json does not; write "{key}": {json.dumps(value)} there'
            )
