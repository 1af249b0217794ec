"""The folder of one run: what was asked, with which versions, what was measured, and where the results lie.

```
runs/<name>/config.yaml      the resolved configuration, ready to be run again
            versions.json    Python and package versions, one entry per environment that worked on the run
            metrics.jsonl    one JSON object per recorded step, never two for the same step
            lock.json        the job that works here, while it does
            samples/  checkpoints/  export/
```
The folder appears complete or not at all, and nothing is created before the configuration was found valid. Imports no torch.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from flashdmd_ray.config import Config, RunConfig, Section, dump_config, load_config
from flashdmd_ray.run.files import check_writable, new_folder, write_atomically
from flashdmd_ray.run.lock import hold
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.run.settings import changed_settings, fixed_settings, settings_not_used_yet
from flashdmd_ray.run.versions import software_versions

CONTROL = "control.json"
"""Where a running job says how its pools can be reached."""

FOLDERS = ("samples", "checkpoints", "export")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. Make one with `check` (creates nothing) or `prepare` (creates or reopens the folder)."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def control(self) -> Path:
        """Address and token of the running job, while it runs."""
        return self.path / CONTROL

    @property
    def errors(self) -> Path:
        """Tracebacks of failed attempts; the terminal shows one line of each."""
        return self.path / "error.log"

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    @classmethod
    def check(cls, settings: RunConfig, config: Section) -> RunDirectory:
        """The folder that `settings`, the section `run` of `config`, names. Refuses what `prepare` would refuse, and leaves no trace.

        Raises ValueError when the folder cannot be written, when it holds something that is no run, or when the configuration in it
        differs from `config` in a setting that a resumed run must share.
        """
        run = cls(settings.dir / settings.name)
        _check_writable(run.path)
        if run.path.exists() and not run.exists and any(run.path.iterdir()):
            raise ValueError(
                f"run.name: {run.path} exists but is not a run folder (it has no config.yaml); choose another name"
            )
        if run.exists:
            run._check_same(config)
        return run

    @classmethod
    def prepare(cls, settings: RunConfig, config: Section) -> RunDirectory:
        """Create the folder of a new run in one rename; that of an old one stays as it is. Raises ValueError like `check`."""
        run = cls.check(settings, config)
        if run.exists:
            return run
        try:
            with new_folder(run.path) as unfinished:
                cls(unfinished).reopen(config)
        except OSError:
            if not run.exists:  # else another job was quicker
                raise
        return run

    def reopen(self, config: Section) -> None:
        """Write the configuration and the versions of this job. Only for the job that holds the folder."""
        for folder in FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        write_atomically(self.config, dump_config(config))
        known = json.loads(self.versions.read_text()) if self.versions.is_file() else []
        versions = software_versions()
        if versions not in known:
            write_atomically(self.versions, json.dumps([*known, versions], indent=1) + "\n")

    def discard_unused(self) -> None:
        """Remove the folder of a run that failed before it recorded or saved anything; one with results stays."""
        with suppress(ValueError), hold(self.path):  # else another job works there
            recorded = bool(read_metrics(self.metrics))
            if self.exists and not recorded and not any(any((self.path / folder).glob("*")) for folder in FOLDERS):
                shutil.rmtree(self.path, ignore_errors=True)

    def _check_same(self, config: Section) -> None:
        try:
            saved = yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError):
            raise ValueError(
                f"{self.config}: cannot be read as the configuration of a run; choose another run.name"
            ) from None
        kind, free = type(config), settings_not_used_yet(read_metrics(self.metrics))
        new = config.model_dump(mode="json")
        changes = changed_settings(fixed_settings(kind, saved, free), fixed_settings(kind, new, free))
        if changes:
            raise ValueError(
                f"run.name: {self.path} was started with another configuration ({changes}); "
                "choose another run.name, or restore the value to resume"
            )


def _check_writable(path: Path) -> None:
    try:
        check_writable(path)
    except OSError as error:
        raise ValueError(
            f"run.dir: cannot write {path} ({error.strerror}: {error.filename}); set run.dir to a folder you can write"
        ) from None


def read_run_config(run: Path) -> Config:
    """The configuration a run was started with. Raises ValueError when `run` is no run folder."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run folder (it has no config.yaml): give one such as runs/demo")
    return load_config(run / "config.yaml")
