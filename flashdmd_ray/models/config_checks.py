"""Checks of the config.json files of a teacher's parts: they go together, and everything in them is read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray.catalog.families import FamilyEntry
from flashdmd_ray.models.headers import ModelFileError

_LATENTS = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None}
"""Keys of a VAE's config.json that say how its latents are scaled, with the value of an absent one."""


def check_shape(config: Mapping[str, Any], folder: Path, counts: Sequence[str] = ()) -> None:
    """Raises ModelFileError unless `counts` of a network's config.json are numbers and its block_out_channels a list of them."""
    wrong = next((key for key in counts if not isinstance(config[key], int) or config[key] < 1), None)
    channels = config.get("block_out_channels", [1])
    if not isinstance(channels, list) or not channels or not all(isinstance(count, int) for count in channels):
        wrong = "block_out_channels"
    if wrong is not None:
        raise ModelFileError(
            f"{folder / 'config.json'} has {wrong} {config[wrong]!r}, which is not read; choose another model"
        )


def check_denoiser(config: Mapping[str, Any], entry: FamilyEntry) -> None:
    """Raises ModelFileError for a network that wants inputs which the family does not give it."""
    for key, value in entry.fixed_keys.items():
        if config.get(key, value) != value:
            raise ModelFileError(
                f"the {entry.denoiser} has {key} {config[key]!r}: it reads inputs that a {entry.pipeline} is not given; choose another"
            )


def check_text(encoders: Mapping[str, Mapping[str, Any]], denoiser: Mapping[str, Any], entry: FamilyEntry) -> None:
    """Raises ModelFileError unless the text encoders are as wide as what the denoiser reads. Sizes that no file states are not compared."""
    joint, times = denoiser.get("joint_attention_dim"), denoiser.get("addition_time_embed_dim")
    pooled, with_times = denoiser.get("pooled_projection_dim"), denoiser.get("projection_class_embeddings_input_dim")
    if with_times is not None and times is not None:
        pooled = with_times - 6 * times
    for key, names, wanted in (
        ("hidden_size", list(entry.text_encoders), denoiser.get("cross_attention_dim") if joint is None else joint),
        ("projection_dim", entry.pooled_encoders, pooled),
    ):
        sizes: list[Any] = [encoders[name].get(key) for name in names]
        if isinstance(wanted, int) and sizes and all(isinstance(size, int) for size in sizes):
            width = sum(sizes)
            if width > wanted or (width < wanted and not (joint and key == "hidden_size")):  # SD3 fills up with zeros
                raise ModelFileError(
                    f"the {entry.denoiser} reads texts of width {wanted}, its text encoders' {key} make {width}: they are of different "
                    "models; choose parts that belong together"
                )


def check_network(
    config: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]], entry: FamilyEntry, folder: Path
) -> None:
    """All of these for a denoiser's config.json, in that folder, beside the configurations of its text encoders."""
    check_shape(config, folder, ("sample_size", "in_channels"))
    check_denoiser(config, entry)
    check_text(encoders, config, entry)


def check_vae(config: Mapping[str, Any], entry: FamilyEntry, channels: int | None, path: str) -> None:
    """Raises ModelFileError for a VAE whose latents are not those of the denoiser, or are scaled in a way that would be ignored.

    channels: of the latents that the denoiser reads; None when unknown.
    """
    scaling = config.get("scaling_factor", 1.0)
    if not isinstance(scaling, int | float) or not scaling > 0:
        raise ModelFileError(
            f"{path} has scaling_factor {scaling!r}; write the factor of its latents into its config.json"
        )
    own = config.get("latent_channels", channels)
    if channels is not None and own != channels:
        raise ModelFileError(f"{path} has {own} latent channels, the teacher {channels}; choose a VAE of its family")
    statistics = [config.get(key) for key in ("latents_mean", "latents_std")]
    if any(value is not None for value in statistics) and not entry.latent_statistics:
        raise ModelFileError(
            f"{path} has latents_mean and latents_std, which a {entry.pipeline} ignores; choose another VAE"
        )
    if (statistics[0] is None) != (statistics[1] is None):
        raise ModelFileError(f"{path} has only one of latents_mean and latents_std; choose another VAE")
    if config.get("shift_factor") and not entry.latent_shift:
        raise ModelFileError(f"{path} has a shift_factor, which a {entry.pipeline} ignores; choose another VAE")


def check_same_latents(config: Mapping[str, Any], teacher: Mapping[str, Any], path: str) -> None:
    """Raises ModelFileError for a VAE whose latents are scaled otherwise than those that the denoiser was trained on.

    config: of the VAE. teacher: of the teacher's own VAE, or of a published one, which leaves most of it out.
    """
    for key, absent in _LATENTS.items():
        own, wanted = config.get(key, absent), teacher.get(key, absent)
        if own != wanted and "_class_name" in teacher:
            raise ModelFileError(f"{path} has {key} {own}, the teacher's VAE {wanted}; choose a VAE of its family")
    count, wanted = (len(each.get("block_out_channels", ())) for each in (config, teacher))
    if count != wanted and count and wanted:
        raise ModelFileError(
            f"a latent of {path} spans {2 ** (count - 1)} pixels, one of the teacher's VAE {2 ** (wanted - 1)}; choose a VAE of its family"
        )
