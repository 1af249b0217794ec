"""Sources of models: exports, run folders and MLflow registries. A source tells its version and copies it. Imports no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from pathlib import Path

from flashdmd_ray.results.export_facts import FACTS
from flashdmd_ray.run.folder import RunDirectory, read_run_config
from flashdmd_ray.run.messages import one_line, typed_line

REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


class ModelSource(ABC):
    """One place. Every method raises ValueError, one line, when there is no model or it cannot be reached."""

    @abstractmethod
    def signature(self) -> str:
        """Return a text that changes when there is another version. Cheap: it is asked every few seconds."""

    @abstractmethod
    def fetch(self, into: Path, timeout_s: float) -> None:
        """Copy the export that `signature` was of to the empty folder `into`."""


class ExportFolder(ModelSource):
    """A directory that flashdmd export wrote, which replaces it in one rename."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def signature(self) -> str:
        if not (self._folder / FACTS).is_file():
            raise ValueError(f"{self._folder} is no export (it has no {FACTS})")
        return signature_of(self._folder)

    def fetch(self, into: Path, timeout_s: float) -> None:
        try:
            shutil.copytree(self._folder, into, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first of its errors
            raise ValueError(
                f"{self._folder} could not be copied ({one_line(reason)}); it changed or went away, or the cache has no room"
            ) from None


class RunFolder(ModelSource):
    """A training run: its export, or its newest checkpoint while it has none."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def signature(self) -> str:
        if (self._run.export / FACTS).is_file():
            return ExportFolder(self._run.export).signature()
        return f"checkpoint {self._newest()}"

    def fetch(self, into: Path, timeout_s: float) -> None:
        if (self._run.export / FACTS).is_file():
            ExportFolder(self._run.export).fetch(into, timeout_s)
            return
        # In a process of its own, whose memory ends with it.
        program = "import sys; from flashdmd_ray.commands.export import export_command; sys.exit(export_command())"
        step = str(int(self._newest().rpartition("-")[2]))
        command = [sys.executable, "-c", program, str(self._run.path), "--checkpoint", step, "--out", str(into)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{self._run.path}: checkpoint {step} was not exported within {timeout_s:g} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise ValueError(f"{self._run.path}: checkpoint {step} cannot be exported ({lines[-1][:300]})")

    def _newest(self) -> str:
        from flashdmd_ray.checkpoint.manifest import newest_first
        from flashdmd_ray.run.storage import checkpoint_root

        checkpoints = newest_first(checkpoint_root(read_run_config(self._run.path), self._run.path))
        if not checkpoints:
            raise ValueError(f"{self._run.path} has neither an export nor a checkpoint yet")
        return checkpoints[0].name


class RegisteredModel(ModelSource):
    """A version in an MLflow registry, or the one that an alias names."""

    def __init__(self, name: str, alias: str | None, version: str | None, registry: str | None) -> None:
        """registry: tracking URI; None is MLflow's own default."""
        self._name = name
        self._alias = alias
        self._version = version
        self._registry = registry

    def signature(self) -> str:
        return f"version {self._resolve()}"

    def fetch(self, into: Path, timeout_s: float) -> None:
        version = self._resolve()
        import mlflow

        mlflow.set_tracking_uri(self._registry)
        try:
            folder = Path(mlflow.artifacts.download_artifacts(f"models:/{self._name}/{version}", dst_path=str(into)))
        except Exception as error:  # MLflow's own, and those of its stores
            raise ValueError(f"models:/{self._name}/{version} cannot be downloaded ({typed_line(error)})") from None
        exports = sorted(file.parent for file in folder.rglob(FACTS))
        if not exports:
            raise ValueError(f"models:/{self._name}/{version} holds no export (no {FACTS})")
        if exports[0] != into:
            for file in list(exports[0].iterdir()):
                file.rename(into / file.name)

    def _resolve(self) -> str:
        if self._version is not None:
            return self._version
        for variable, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")):
            os.environ.setdefault(variable, value)
        import mlflow

        try:
            registered = mlflow.MlflowClient(self._registry).get_model_version_by_alias(self._name, self._alias)
        except Exception as error:
            raise ValueError(
                f"models:/{self._name}@{self._alias} is not in the registry ({typed_line(error)})"
            ) from None
        return str(registered.version)


def open_source(text: str, registry: str | None = None) -> ModelSource:
    """Open the source that a setting names. Raises ValueError when it is none of the three kinds."""
    if text.startswith("models:"):
        match = REGISTERED.fullmatch(text)
        if match is None:
            raise ValueError(f"{text}: write models:/name@alias or models:/name/version")
        return RegisteredModel(match["name"], match["alias"], match["version"], registry)
    folder = Path(text)
    if (folder / FACTS).is_file():
        return ExportFolder(folder)
    if (folder / "config.yaml").is_file():
        return RunFolder(RunDirectory(folder))
    raise ValueError(
        f"{text} is neither an export (no {FACTS}) nor a run folder (no config.yaml): "
        "give one such as runs/demo, or models:/name@alias"
    )


def signature_of(folder: Path) -> str:
    """List names, sizes, times and inodes of all files below a folder."""
    lines = []
    try:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            status = file.stat()
            lines.append(f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    except OSError:
        raise ValueError(f"{folder} changed while it was looked at") from None
    return "\n".join(lines)
