"""The MLflow run that belongs to a run folder. MLflow itself is imported when one is opened."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashdmd_ray import __version__
from flashdmd_ray.run.destinations import LeftOut, Unusable
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.messages import typed_line
from flashdmd_ray.run.mlflow_names import REGISTERED_MODEL, mlflow_key, mlflow_model_name
from flashdmd_ray.run.settings import flatten

BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""How many MLflow takes in one call."""
LONGEST_PARAM = 6000
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's page open on charts; otherwise it guesses, and shows the views for language models and agents."""
BAD_DATA = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
"""Error codes of a value that no later attempt makes better."""
REFUSALS = (
    *BAD_DATA,
    "ENDPOINT_NOT_FOUND",
    "INVALID_STATE",
    "NOT_FOUND",
    "NOT_IMPLEMENTED",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
"""Error codes of an order that will never be obeyed: the server is too old, say, or does not let this user register models."""


class MlflowRun:
    """The run named in the folder's `mlflow.json` if the server knows it, else a new one.

    Methods raise what MLflow raises, and Unusable.
    """

    def __init__(
        self, folder: Path, uri: str, shown_uri: str, experiment: str, leave_out: Callable[[str], None]
    ) -> None:
        """shown_uri: the URI without its password. leave_out: told what MLflow refused for good, and why."""
        import mlflow
        from mlflow.exceptions import MlflowException

        mlflow.set_tracking_uri(uri)
        self.folder = folder
        self._leave_out = leave_out
        try:
            self.client = mlflow.MlflowClient(uri)
            self.experiment_id = self._experiment(uri, experiment)
        except MlflowException as error:
            if "database schema" in str(error):
                raise Unusable(
                    f"the database {shown_uri} is of another MLflow than this one ({mlflow.__version__}): make a copy of it, run "
                    "'mlflow db upgrade' on it, or set tracking.uri to another one"
                ) from error
            raise
        self.run_id = self._resume(shown_uri) or self._create(shown_uri)
        self._last_step: dict[str, int] = {}
        self._refused: set[str] = set()
        self._images: set[str] | None = None
        self._models: dict[str, Any] = {}
        self._log_params()

    def _experiment(self, uri: str, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                raise Unusable(
                    _deleted("experiment", name, f"experiments restore --experiment-id {experiment.experiment_id}")
                )
            return str(experiment.experiment_id)
        # A database has no place for files of its own; a server does.
        files = (
            (self.folder.parent / "mlflow-artifacts").as_uri() if "://" in uri and not uri.startswith("http") else None
        )
        return str(self.client.create_experiment(name, artifact_location=files, tags=TRAINING))

    def _resume(self, shown_uri: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            saved = json.loads((self.folder / "mlflow.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        if saved.get("uri") != shown_uri:
            return None
        try:
            self.client.update_run(saved["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
                return None
            raise
        return str(saved["run_id"])

    def _create(self, shown_uri: str) -> str:
        from mlflow.tracking.context.registry import resolve_tags  # the user, and the commit of a checkout

        tags = resolve_tags({"mlflow.source.name": f"flashdmd_ray {__version__}", "mlflow.note.content": self._note()})
        run_id = str(self.client.create_run(self.experiment_id, tags=tags, run_name=self.folder.name).info.run_id)
        write_atomically(self.folder / "mlflow.json", json.dumps({"uri": shown_uri, "run_id": run_id}) + "\n")
        return run_id

    def _note(self) -> str:
        """The run's description on MLflow's page, as markdown."""
        config = self._config()
        return (
            f"A few-step student of {config['model']['teacher']} ({config['model']['family']}), started for {config['steps']} steps "
            f"of batch {config['batch']}.\n\nFolder: `{self.folder}`. Resume: `flashdmd train {self.folder / 'config.yaml'}`."
        )

    def _config(self) -> dict[str, Any]:
        """The run folder's configuration."""
        import yaml

        config: dict[str, Any] = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))
        return config

    def refuses(self, error: Exception) -> bool:
        if getattr(error, "error_code", None) not in REFUSALS:
            return False
        self.check_usable()
        return True

    def check_usable(self) -> None:
        """Raise Unusable when the run, or its experiment, was deleted meanwhile."""
        if self.client.get_run(self.run_id).info.lifecycle_stage != "deleted":
            return
        experiment = self.client.get_experiment(self.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise Unusable(
                _deleted("experiment", experiment.name, f"experiments restore --experiment-id {self.experiment_id}")
            )
        raise Unusable(_deleted("run", self.folder.name, f"runs restore --run-id {self.run_id}"))

    def _log_params(self) -> None:
        """The flattened configuration. MLflow's parameters are fixed once set, so what a resumed run changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        values = {mlflow_key(key): _cut(str(value)) for key, value in flatten(self._config()).items()}
        logged = self.client.get_run(self.run_id).data.params
        self._send("params", [Param(key, value) for key, value in values.items() if key not in logged])
        changed = {key: value for key, value in values.items() if logged.get(key, value) != value}
        self._send("tags", [RunTag(mlflow_key(f"resumed.{key}"), value) for key, value in changed.items()])

    def log_metrics(self, records: list[tuple[int, dict[str, Any]]]) -> None:
        """Log (time in ms, record of metrics.jsonl) pairs; keys and steps that the server has are left out."""
        from mlflow.entities import Metric

        metrics = []
        for milliseconds, record in records:
            for name, value in record.items():
                key = mlflow_key(name)
                if name != "step" and key not in self._refused and record["step"] > self._last(key):
                    metrics.append(Metric(key, float("nan") if value is None else value, milliseconds, record["step"]))
        self._send("metrics", metrics)
        self._last_step |= {metric.key: metric.step for metric in metrics}

    def _last(self, key: str) -> int:
        if key not in self._last_step:
            history = self.client.get_metric_history(self.run_id, key)
            self._last_step[key] = max((metric.step for metric in history), default=-1)
        return self._last_step[key]

    def _send(self, kind: str, entries: Sequence[Any]) -> None:
        for start in range(0, len(entries), BATCH[kind]):
            self._send_batch(kind, entries[start : start + BATCH[kind]])

    def _send_batch(self, kind: str, entries: Sequence[Any]) -> None:
        """Send entries in one call. Those that MLflow refuses for good are found by halving, left out, and named once."""
        from mlflow.exceptions import MlflowException

        entries = [entry for entry in entries if entry.key not in self._refused]
        try:
            if entries:
                self.client.log_batch(self.run_id, **{kind: entries})
        except MlflowException as error:
            if error.error_code not in BAD_DATA:
                raise
            if len(entries) > 1:
                middle = len(entries) // 2
                self._send_batch(kind, entries[:middle])
                self._send_batch(kind, entries[middle:])
                return
            self.check_usable()
            self._refused.add(entries[0].key)
            self._leave_out(f"{kind.removesuffix('s')} '{entries[0].key}' ({typed_line(error)})")

    def log_image(self, key: str, path: str, step: int) -> None:
        """Log an image file of the run folder once. Raises LeftOut when it is not there any more."""
        from PIL import Image

        if self._images is None:
            self._images = {
                Path(artifact.path).name.partition("+timestamp")[0]
                for artifact in self.client.list_artifacts(self.run_id, "images")
            }
        label = f"{key.replace('/', '#')}+step+{step}"
        if label in self._images or label.replace("#", "~") in self._images:
            return
        try:
            with Image.open(self.folder / path) as image:
                pixels = image.convert("RGB")
        except OSError as error:
            raise LeftOut(typed_line(error)) from error
        self.client.log_image(self.run_id, pixels, key=key, step=step, synchronous=True)
        self._images.add(label)

    def log_file(self, path: str) -> None:
        """Log a file of the run folder as an artifact."""
        if not (self.folder / path).is_file():
            raise LeftOut(f"{self.folder / path} is not there")
        self.client.log_artifact(self.run_id, str(self.folder / path))

    def log_model(self, export: str) -> None:
        """Log the exported pipeline as a model of this run, and register it as the newest version of a registered model."""
        from mlflow.exceptions import MlflowException

        folder = self.folder / export
        if not folder.is_dir():
            raise LeftOut(f"{folder} is not there")
        model = self._models.get(export)
        if model is None:  # else a transfer failed half way
            name = mlflow_model_name(self.folder.name)
            model = self.client.create_logged_model(self.experiment_id, name, self.run_id, model_type="diffusers")
            self._models[export] = model
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        card = folder / "README.md"
        description = card.read_text(encoding="utf-8")[:5000] if card.is_file() else None
        try:
            self.client.create_registered_model(REGISTERED_MODEL)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            REGISTERED_MODEL, model.model_uri, self.run_id, description=description, model_id=model.model_id
        )
        self.client.set_registered_model_alias(REGISTERED_MODEL, "newest", version.version)
        del self._models[export]

    def tag(self, key: str, text: str) -> None:
        self.client.set_tag(self.run_id, mlflow_key(key), text)

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 4]} ..."


def _deleted(what: str, name: str, remedy: str) -> str:
    return f"the MLflow {what} '{name}' was deleted: restore it ('mlflow {remedy}'), or set tracking.experiment to another name"
