"""The forward process and the samplers: everything between a network's output and x0, in float32 or wider."""

from flashdmd_ray.diffusion.sampling import (
    PredictX0,
    backward_simulation,
    backward_simulations,
    complete,
    ddim_sample,
    few_step_sample,
    guided,
    hop,
    trailing_timesteps,
    transition,
)
from flashdmd_ray.diffusion.schedule import FlowSchedule, NoiseSchedule, VPSchedule, schedule_from_config

__all__ = [
    "FlowSchedule",
    "NoiseSchedule",
    "PredictX0",
    "VPSchedule",
    "backward_simulation",
    "backward_simulations",
    "complete",
    "ddim_sample",
    "few_step_sample",
    "guided",
    "hop",
    "schedule_from_config",
    "trailing_timesteps",
    "transition",
]
