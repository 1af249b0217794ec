"""The folder of one run: what was asked, with which versions, what was measured, and where the results lie.

```
runs/<name>/config.yaml      the resolved configuration, ready to be run again
            versions.json    Python and package versions, one entry per environment that worked on the run
            metrics.jsonl    one JSON object per recorded step, never two for the same step
            samples/  checkpoints/  export/
```
The folder appears complete or not at all, and nothing is created before the configuration was found valid. Imports no torch.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from flashdmd_ray.run.files import check_writable, new_folder, write_atomically

CONTROL = "control.json"
"""Where a running job says how its pools can be reached."""

RESUME_MAY_CHANGE = (
    "steps",
    "runtime",
    "run",
    "placement",
    "deadlines",
    "control",
    "checkpoint.every",
    "checkpoint.asynchronous",
    "checkpoint.keep",
    "checkpoint.best_metric",
    "checkpoint.best_mode",
    "tracking",
    "evaluation",
    "monitor.enabled",
    "monitor.reward_rise",
    "monitor.limits",
    "monitor.action",
    "monitor.lower_by",
    "engine.kind",
    "engine.zero_stage",
    "engine.accumulation",
    "engine.gradient_checkpointing",
    "engine.offload_optimizer",
    "engine.compile",
    "data.decode",
    "data.workers",
    "data.prefetch",
    "data.cache",
)
"""Configuration sections and keys that do not change what a step computes (but for rounding), so a resumed run may set them anew."""

PACKAGES = (
    "flashdmd-ray",
    "torch",
    "ray",
    "deepspeed",
    "diffusers",
    "transformers",
    "segment-anything",
    "numpy",
    "mlflow",
)
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
    def check(
        cls,
        root: Path,
        name: str,
        config: Mapping[str, Any] | None = None,
        may_change: Collection[str] = RESUME_MAY_CHANGE,
    ) -> RunDirectory:
        """Refuse what `prepare` would refuse, and leave no trace.

        Raises ValueError when the name is no plain folder name, when the folder cannot be written, when it holds something that is no
        run, or when `config` (if given) differs from the saved one in a section outside `may_change`.
        """
        run = cls(Path(root) / plain_name(name))
        _check_writable(run.path)
        if run.path.exists() and not run.exists and any(run.path.iterdir()):
            raise ValueError(
                f"run.name: {run.path} exists but is not a run folder (it has no config.yaml); choose another name"
            )
        if run.exists and config is not None:
            run._check_same(config, may_change)
        return run

    @classmethod
    def prepare(
        cls,
        root: Path,
        name: str,
        config: Mapping[str, Any],
        may_change: Collection[str] = RESUME_MAY_CHANGE,
    ) -> RunDirectory:
        """Create the folder of a new run in one rename, or reopen that of an old one. Raises ValueError like `check`."""
        run = cls.check(root, name, config, may_change)
        if not run.exists:
            run._create(config)
            return run
        for folder in FOLDERS:
            (run.path / folder).mkdir(exist_ok=True)
        write_atomically(run.config, _to_yaml(config))
        seen = json.loads(run.versions.read_text()) if run.versions.is_file() else []
        if (versions := environment()) not in seen:
            write_atomically(run.versions, json.dumps([*seen, versions], indent=1) + "\n")
        return run

    def discard_unused(self) -> None:
        """Remove the folder of a run that failed before it recorded or saved anything; one with results stays."""
        recorded = bool(read_metrics(self.metrics))
        if self.exists and not recorded and not any(any((self.path / folder).glob("*")) for folder in FOLDERS):
            shutil.rmtree(self.path, ignore_errors=True)

    def _create(self, config: Mapping[str, Any]) -> None:
        with new_folder(self.path) as unfinished:
            for folder in FOLDERS:
                (unfinished / folder).mkdir()
            (unfinished / "config.yaml").write_text(_to_yaml(config), encoding="utf-8")
            (unfinished / "versions.json").write_text(json.dumps([environment()], indent=1) + "\n")

    def _check_same(self, config: Mapping[str, Any], may_change: Collection[str]) -> None:
        try:
            saved = yaml.safe_load(self.config.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError):
            raise ValueError(
                f"{self.config}: cannot be read as the configuration of a run; choose another run.name"
            ) from None
        changes = changed_settings(fixed_settings(saved, may_change), fixed_settings(config, may_change))
        if changes:
            raise ValueError(
                f"run.name: {self.path} was started with another configuration ({changes}); "
                "choose another run.name, or restore the value to resume"
            )


class MetricsLog:
    """`metrics.jsonl`: append-only JSON lines `{"step": 3, "score/loss": 0.12, ...}`, each on disk when `write` returns.

    Records of steps after `after_step` (those a resumed run will compute again) and a line torn by a crash are dropped on opening.
    A value that is not finite is written as null: JSON has no NaN.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        _drop_later_steps(path, after_step)
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def rewind(self, after_step: int) -> None:
        """Drop the records of steps after `after_step`: they will be computed again."""
        self._file.close()
        _drop_later_steps(self._path, after_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        record = {"step": int(step)} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics file; a torn last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _drop_later_steps(path: Path, after_step: int) -> None:
    if not path.is_file():
        return
    kept = "".join(json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= after_step)
    if kept != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, kept)


def plain_name(name: str) -> str:
    """The name itself when it is one plain, visible folder name. Raises ValueError otherwise: nothing is written outside the runs."""
    if not name.strip() or name.startswith(".") or ".." in name or any(c in "/\\" or not c.isprintable() for c in name):
        raise ValueError(f"run.name: '{name}' must be a plain folder name without '/', '\\', '..' or a leading dot")
    return name


def _check_writable(path: Path) -> None:
    try:
        check_writable(path)
    except OSError as error:
        raise ValueError(
            f"run.dir: cannot write {path} ({error.strerror}: {error.filename}); set run.dir to a folder you can write"
        ) from None


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2, {"d": 3}]} -> {"a.b": 1, "c": ...}; lists with mappings are numbered, other lists stay one value."""
    if isinstance(tree, Mapping) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = [(str(index), item) for index, item in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def fixed_settings(config: Mapping[str, Any], may_change: Collection[str] = RESUME_MAY_CHANGE) -> dict[str, Any]:
    """The settings, by dotted key, that a resumed run must share."""
    flat = flatten(json.loads(json.dumps(config, default=str)))
    return {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in may_change)
    }


def changed_settings(saved: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first three differences in words, '' when there are none."""
    changes = [
        f"{key} was {saved.get(key, 'not set')} and is now {new.get(key, 'not set')}"
        for key in dict.fromkeys([*saved, *new])
        if saved.get(key) != new.get(key)
    ]
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def environment() -> dict[str, Any]:
    """Versions that a result depends on. Package versions are read from metadata, nothing heavy is imported."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = None
    return found


def _to_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)
