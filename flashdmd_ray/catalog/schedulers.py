"""Schedulers of diffusers: which of the two forward processes a configuration describes, or why neither. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

TIMESTEPS = 1000
"""Training timesteps of a teacher: those of the settings count so many."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTIONS = ("epsilon", "v_prediction")
"""Prediction types of a variance-preserving network."""


def forward_process(config: Mapping[str, Any]) -> Literal["flow", "vp"]:
    """flow: rectified flow with a fixed shift. vp: variance preserving, with betas.

    Samplers of one form have one configuration: the class of the scheduler says nothing. Raises ValueError, with the remedy, for
    schedules that are neither.
    """
    name = config.get("_class_name", "scheduler config")
    if config.get("num_train_timesteps", TIMESTEPS) != TIMESTEPS:
        raise ValueError(
            f"{name} has {config['num_train_timesteps']!r} training timesteps; timesteps are counted from 0 to {TIMESTEPS - 1} here: "
            f"choose a model with {TIMESTEPS}"
        )
    if config.get("invert_sigmas") or config.get("snr_shift_scale"):
        raise ValueError(f"{name} has invert_sigmas or snr_shift_scale, which is not supported; choose another model")
    # "shift" without betas is what all flow-matching schedulers have.
    if "shift" in config and "beta_schedule" not in config:
        if config.get("use_dynamic_shifting"):
            raise ValueError("scheduler use_dynamic_shifting is not supported: set it to false and give a fixed shift")
        if not _is_positive(config["shift"]):
            raise ValueError(f"scheduler shift must be positive, got {config['shift']!r}")
        return "flow"
    if str(name).startswith("EDM") or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} is of the EDM form, whose network is conditioned on sigmas; choose an eps-, v- or flow-prediction model"
        )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(f"{name} has neither a beta_schedule nor a flow shift; use a DDPM- or FlowMatch-type one")
    _check_betas(config, name)
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"scheduler prediction_type '{prediction}' is not supported; use 'epsilon' or 'v_prediction'")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler rescale_betas_zero_snr needs a v-prediction network: at zero signal eps says nothing about x0"
        )
    return "vp"


def _check_betas(config: Mapping[str, Any], name: object) -> None:
    """Raises ValueError for betas that diffusers cannot compute."""
    betas = config.get("trained_betas")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != TIMESTEPS or not all(map(_is_positive, betas)):
            raise ValueError(f"{name}: trained_betas must be {TIMESTEPS} positive numbers; choose another model")
        return
    if config["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"scheduler beta_schedule {config['beta_schedule']!r} is unknown; use {', '.join(BETA_SCHEDULES)}"
        )
    for key in ("beta_start", "beta_end"):
        if not _is_positive(config.get(key, 1)):
            raise ValueError(f"scheduler {key} must be a positive number, got {config[key]!r}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
