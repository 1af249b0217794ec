"""The run itself and what it leaves behind: its folder, checkpoints, records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from flashdmd_ray.config.section import (
    LocalPath,
    MayChange,
    PositiveInt,
    PublicUrl,
    Section,
    TrackingUrl,
    without_variables,
)


def _plain_name(name: str) -> str:
    """The name itself when it is one plain, visible folder name: nothing is written outside the runs."""
    if (
        not name.strip()
        or name.startswith((".", "~"))
        or ".." in name
        or any(c in "/\\" or not c.isprintable() for c in name)
    ):
        raise ValueError(
            "must be a plain folder name of printable letters without '/', '\\', '..' or a leading '.' or '~'"
        )
    return name


class RunConfig(Section):
    name: Annotated[str, AfterValidator(_plain_name), AfterValidator(without_variables)] = "demo"
    """Folder of this run below `dir`; the same name again resumes it."""
    dir: LocalPath = Path("runs")
    """Where run folders and the default MLflow database live."""


class CheckpointConfig(Section):
    every: MayChange[PositiveInt] = 50
    """Steps between checkpoints; the last step always writes one."""
    dir: PublicUrl | None = None
    """A folder or URL (s3://bucket/folder, gs://..., any that fsspec has a driver for) that gets a folder of the run's name;
    null keeps checkpoints in the run folder. All machines of a job must see it."""
    asynchronous: MayChange[bool] = True
    """true: training goes on while a checkpoint is written, from copies in host memory. false: training waits."""
    keep: MayChange[PositiveInt] = 2
    """The newest so many complete checkpoints stay; older ones are removed when a new one is complete."""
    on_damage: MayChange[Literal["previous", "refuse"]] = "previous"
    """previous: a damaged newest checkpoint is set aside and named, and the one before it is used. refuse: the run ends."""
    best_metric: MayChange[str | None] = None
    """A metric such as matching/real_fake_gap: the checkpoint with the best mean of it over the steps since the one before stays too."""
    best_mode: MayChange[Literal["min", "max"]] = "min"
    """Whether small or large values of `best_metric` are good."""


class ProfileConfig(Section):
    steps: tuple[PositiveInt, ...] = ()
    """Steps, counted from 1, whose calls of rank 0 are traced by torch's profiler, each into a file of the folder `profile` of the run
    that https://ui.perfetto.dev opens (docs/metrics.md). Such steps are slower."""


class TrackingConfig(Section):
    uri: TrackingUrl | None = None
    """MLflow tracking server; null uses a sqlite file beside the runs."""
    uri_env: str | None = None
    """Environment variable that holds the address instead: for one with a password, which must not be printed and stored."""
    experiment: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(without_variables)] = "flashdmd_ray"
    """Experiment in MLflow. Exports are versions of the registered model flashdmd_ray, whatever the experiment."""
    enabled: bool = True
    """Send the run to MLflow. The run folder is written in any case."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the folder tensorboard of the run: metrics, grids and texts. Needs the extra 'tensorboard'."""
    wandb: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(without_variables)] | None = None
    """Project of Weights & Biases, or 'team/project'; null: not used. Its own variables (WANDB_API_KEY, WANDB_MODE=offline) say the rest.
    Needs the extra 'wandb'."""
    samples_every: PositiveInt = 50
    """Steps between sample grids."""
    log_every: PositiveInt = 1
    """Steps between metric records."""

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        if self.uri is not None and self.uri_env is not None:
            raise ValueError("uri_env: names the variable that holds the address, so uri must be null")
        return self
