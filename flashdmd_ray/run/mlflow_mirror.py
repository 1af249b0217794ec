"""Copies a run folder to MLflow while it grows: `python -m flashdmd_ray.run.mlflow_mirror RUN_FOLDER --uri ... --experiment ...`.

MLflow works in this process, not in the training's: importing it and creating the sqlite schema take seconds, a server may be slow, away
or silent, and none of that may delay or end a training. The run folder is the truth. Metrics are read from its `metrics.jsonl`, so
whatever a server missed is sent later, and a (key, step) that the server has is not sent twice, also when a run resumes.

One JSON object per line on standard input tells the rest: {"image": [key, path, step]}, {"tag": [key, text]}, {"model": folder},
{"finish": "FINISHED"}. End of input without "finish" means that the training died: the run is closed as KILLED. On standard output, one
line per sign of life: "ok" after a successful transfer, else a text for the user.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashdmd_ray.run.messages import typed_line

PERIOD_S = 2.0
"""Between two transfers of metrics."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts while the server does not answer; the first pause is PERIOD_S, each one doubles."""
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
LONGEST_PARAM = 500

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


class MLflowRun:
    """The MLflow run that belongs to a run folder: the one named in its `mlflow.json` if the server knows it, else a new one."""

    def __init__(self, folder: Path, uri: str, experiment: str) -> None:
        import mlflow

        say("ok")  # the import alone takes seconds
        mlflow.set_tracking_uri(uri)
        self.folder = folder
        self.client = mlflow.MlflowClient(uri)
        self.experiment_id = self._experiment(uri, experiment)
        self.run_id = self._resume(uri) or self._create(uri)
        self._last_step: dict[str, int] = {}
        self._images: set[str] | None = None
        self._log_params()

    def _experiment(self, uri: str, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # A database has no place for files of its own; a server does.
        files = (
            (self.folder.parent / "mlflow-artifacts").as_uri() if "://" in uri and not uri.startswith("http") else None
        )
        return str(self.client.create_experiment(name, artifact_location=files))

    def _resume(self, uri: str) -> str | None:
        from mlflow.exceptions import MlflowException

        try:
            saved = json.loads((self.folder / "mlflow.json").read_text())
        except (OSError, json.JSONDecodeError):
            return None
        if saved.get("uri") != uri:
            return None
        try:
            self.client.update_run(saved["run_id"], status="RUNNING")
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"):
                return None
            raise
        return str(saved["run_id"])

    def _create(self, uri: str) -> str:
        run_id = str(self.client.create_run(self.experiment_id, run_name=self.folder.name).info.run_id)
        (self.folder / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": run_id}) + "\n")
        return run_id

    def _log_params(self) -> None:
        """The flattened configuration. MLflow's parameters are fixed once set, so what a resumed run changed becomes a tag."""
        import yaml
        from mlflow.entities import Param, RunTag

        from flashdmd_ray.run.settings import flatten

        config = flatten(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))
        wanted = {key: str(value)[:LONGEST_PARAM] for key, value in config.items()}
        known = self.client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in wanted.items() if key not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(self.run_id, params=new[start : start + PARAMS_PER_CALL])
        changed = [RunTag(f"resumed.{key}", value) for key, value in wanted.items() if known.get(key, value) != value]
        if changed:
            self.client.log_batch(self.run_id, tags=changed)

    def log_metrics(self, records: list[tuple[int, dict[str, Any]]]) -> None:
        """(time in ms, record of metrics.jsonl) pairs; keys and steps that the server has are left out."""
        from mlflow.entities import Metric

        metrics = []
        for milliseconds, record in records:
            for key, value in record.items():
                if key != "step" and record["step"] > self._last(key):
                    metrics.append(Metric(key, float("nan") if value is None else value, milliseconds, record["step"]))
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_CALL])
        self._last_step |= {metric.key: metric.step for metric in metrics}

    def _last(self, key: str) -> int:
        if key not in self._last_step:
            history = self.client.get_metric_history(self.run_id, key)
            self._last_step[key] = max((metric.step for metric in history), default=-1)
        return self._last_step[key]

    def log_image(self, key: str, path: str, step: int) -> None:
        from PIL import Image

        if self._images is None:
            self._images = {
                Path(found.path).name.partition("+timestamp")[0]
                for found in self.client.list_artifacts(self.run_id, "images")
            }
        label = f"{key.replace('/', '#')}+step+{step}"
        if label in self._images or label.replace("#", "~") in self._images:
            return
        with Image.open(self.folder / path) as image:
            self.client.log_image(self.run_id, image.convert("RGB"), key=key, step=step, synchronous=True)
        self._images.add(label)

    def log_model(self, export: str, registered_name: str) -> None:
        """The exported pipeline as a logged model of this run, and as the newest version of a registered model."""
        from mlflow.exceptions import MlflowException

        folder = self.folder / export
        model = self.client.create_logged_model(
            self.experiment_id, name=self.folder.name, source_run_id=self.run_id, model_type="diffusers"
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, "READY")
        card = folder / "README.md"
        description = card.read_text(encoding="utf-8")[:5000] if card.is_file() else None
        try:
            self.client.create_registered_model(registered_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            registered_name,
            source=model.model_uri,
            run_id=self.run_id,
            model_id=model.model_id,
            description=description,
        )
        self.client.set_registered_model_alias(registered_name, "newest", version.version)

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


class MetricsTail:
    """Complete lines that were appended to a file since the last look; all of them again when the file was replaced (on a resume)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._file_id = 0

    def new_records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file_id = os.fstat(file.fileno()).st_ino
            if file_id != self._file_id:
                self._file_id, self._offset = file_id, 0
            file.seek(self._offset)
            lines = file.read().split(b"\n")[:-1]
        self._offset += sum(len(line) + 1 for line in lines)
        now = int(time.time() * 1000)
        for line in lines:
            yield now, json.loads(line)


class Mirror:
    """Does what is due, in order; what fails stays due."""

    def __init__(self, connect: Callable[[], MLflowRun], folder: Path, registered_name: str) -> None:
        self._connect = connect
        self._run: MLflowRun | None = None
        self._tail = MetricsTail(folder / "metrics.jsonl")
        self._records: list[tuple[int, dict[str, Any]]] = []
        self._orders: list[dict[str, Any]] = []
        self._registered_name = registered_name

    def transfer(self, orders: list[dict[str, Any]]) -> None:
        """Send everything that is due. Raises whatever MLflow raises."""
        self._orders += orders
        self._records += self._tail.new_records()
        if self._run is None:
            self._run = self._connect()
            say("ok")
        if self._records:
            self._run.log_metrics(self._records)
            self._records = []
        while self._orders:
            self._obey(self._run, self._orders[0])
            self._orders.pop(0)
            say("ok")

    def _obey(self, run: MLflowRun, order: dict[str, Any]) -> None:
        match order:
            case {"image": [key, path, step]}:
                run.log_image(key, path, step)
            case {"tag": [key, text]}:
                run.client.set_tag(run.run_id, key, text)
            case {"model": folder}:
                run.log_model(folder, self._registered_name)
            case {"finish": status}:
                run.finish(status)
            case _:
                raise AssertionError(f"unknown order {order}")


def follow(mirror: Mirror, inbox: queue.SimpleQueue[dict[str, Any]]) -> bool:
    """Transfer until "finish" was obeyed (True), or failed after it was ordered (False). Between failures the pauses grow."""
    pause, warned, finishing = PERIOD_S, False, False
    while True:
        orders = []
        deadline = time.monotonic() + pause
        while not finishing and (left := deadline - time.monotonic()) > 0:
            try:
                orders.append(inbox.get(timeout=left))
            except queue.Empty:
                break
            finishing = "finish" in orders[-1]
        try:
            mirror.transfer(orders)
        except Exception as error:
            logging.exception("a transfer failed")
            if finishing:
                say(f"MLflow did not take everything ({typed_line(error)}); the run folder has it all")
                return False
            if not warned:
                say(f"MLflow cannot be reached ({typed_line(error)}); the run goes on, the transfer is tried again")
            pause, warned = min(2 * pause, LONGEST_PAUSE_S), True
        else:
            pause = PERIOD_S
            if finishing:
                return True
            say("ok")


def say(text: str) -> None:
    """One line to the training process, which may be gone."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (stays open to the end)


def read_orders(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        inbox.put(json.loads(line))
    inbox.put({"finish": "KILLED"})


def main() -> int:
    parser = argparse.ArgumentParser(description="Mirror a run folder to MLflow.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uri", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--registered-model", required=True)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.SIG_IGN
        )  # a Ctrl-C is meant for the training, which then says "finish" or closes the input
    os.nice(5)
    folder = arguments.folder.resolve()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_orders, args=(inbox,), daemon=True).start()
    mirror = Mirror(
        lambda: MLflowRun(folder, arguments.uri, arguments.experiment),
        folder,
        registered_name=arguments.registered_model,
    )
    return 0 if follow(mirror, inbox) else 1


if __name__ == "__main__":
    sys.exit(main())
