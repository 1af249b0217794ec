"""When a reward counts as hacked, and what is done then."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flashdmd_ray.config.section import MayChange, PositiveFloat, PositiveInt, Section


class MonitorLimits(Section):
    """Largest moves of a signal from its start before an alarm is raised. Beyond twice as far the alarm counts twice. null leaves it out.

    docs/hack_monitor.md says where the defaults come from.
    """

    held_out_gap: PositiveFloat | None = 0.5
    """Rise of the optimised rewards minus that of the held-out ones, each in units of its spread over candidates at the start."""
    disagreement: PositiveFloat | None = 0.5
    """Rise of 1 minus the rank correlation of two rewards within a prompt group, mean over pairs of rewards (GARDO's sign)."""
    latent_correlation: PositiveFloat | None = 0.5
    """Fall of the rank correlation of a latent and another reward within a prompt group."""
    dark_share: PositiveFloat | None = 0.05
    """Rise of the share of dark pixels, luminance below 0.1."""
    bright_share: PositiveFloat | None = 0.05
    """Rise of the share of bright pixels, luminance above 0.9."""
    saturation: PositiveFloat | None = 0.25
    """Rise of the mean difference of a pixel's largest and smallest channel, as a share of its start."""
    colour_entropy: PositiveFloat | None = 0.15
    """Fall of the entropy of an image's colours, as a share of its start."""
    edge_density: PositiveFloat | None = 0.2
    """Fall of the share of pixels on an edge, as a share of its start."""
    group_diversity: PositiveFloat | None = 0.2
    """Fall of the mean distance between the candidates of a prompt, as a share of its start."""
    prompt_diversity: PositiveFloat | None = 0.1
    """Fall of the mean distance between images of different prompts, as a share of its start."""


class MonitorConfig(Section):
    enabled: MayChange[bool] = True
    """Watch rewards and candidates' images for alarms of reward hacking (docs/hack_monitor.md)."""
    every: PositiveInt = 1
    """Steps with preference updates between two probes: the groups of one preference update, always of the same prompts and noise, rolled
    out and rewarded with the weights of the step, and not trained on."""
    warmup: PositiveInt = 3
    """Probes whose median is the start that everything is compared with. The first sees the weights before any update."""
    window: PositiveInt = 5
    """Probes whose median is compared with it: the last so many."""
    reward_rise: MayChange[Annotated[float, Field(ge=0)]] = 0.02
    """Rise of an optimised reward, in units of its spread over candidates at the start, up to which nothing counts as hacking."""
    limits: MayChange[MonitorLimits] = MonitorLimits()
    """How far each signal may move."""
    action: MayChange[Literal["report", "lower", "stop"]] = "report"
    """What a verdict of hacking does. lower: scales the learning rate of preference updates (under AdamW a smaller weight of the loss would
    change nothing). stop: ends the run with exit code 3. The newest checkpoint written while healthy is kept whatever the action."""
    lower_by: MayChange[Annotated[float, Field(gt=0, lt=1)]] = 0.1
    """Factor of the action 'lower'; again when a further `window` of probes is still hacking."""
