"""Schedulers of diffusers: which of the two forward processes a configuration describes, or why neither. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

PREDICTIONS = ("epsilon", "v_prediction")
"""Prediction types of a variance-preserving network."""


def forward_process(config: Mapping[str, Any]) -> Literal["flow", "vp"]:
    """flow: rectified flow with a fixed shift. vp: variance preserving, with betas.

    Samplers of one form have one configuration: the class of the scheduler says nothing. Raises ValueError, with the remedy, for
    schedules that are neither.
    """
    name = config.get("_class_name", "scheduler config")
    # "shift" without betas is what all flow-matching schedulers have.
    if "shift" in config and "beta_schedule" not in config:
        if config.get("use_dynamic_shifting"):
            raise ValueError("scheduler use_dynamic_shifting is not supported: set it to false and give a fixed shift")
        return "flow"
    if str(name).startswith("EDM") or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{name} is of the EDM form, whose network is conditioned on sigmas; choose an eps-, v- or flow-prediction model"
        )
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(f"{name} has neither a beta_schedule nor a flow shift; use a DDPM- or FlowMatch-type one")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"scheduler prediction_type '{prediction}' is not supported; use 'epsilon' or 'v_prediction'")
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "scheduler rescale_betas_zero_snr needs a v-prediction network: at zero signal eps says nothing about x0"
        )
    return "vp"
