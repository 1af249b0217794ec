"""Tracking with real MLflow processes: on sqlite, through a crash and a resume, and with servers that refuse or never answer."""

import contextlib
import json
import logging
import os
import socket
import time

import pytest
from PIL import Image

from flashdmd_ray.config import Config, TrackingConfig
from flashdmd_ray.results.export_facts import FACTS
from flashdmd_ray.run import tracking
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.run.tracking import Tracker, default_uri
from flashdmd_ray.serving.model_sources import open_source


def new_run(root, name="first", **changes):
    config = Config.model_validate({"run": {"dir": str(root), "name": name}, **changes})
    run = RunDirectory.prepare(config.run, config)
    run.reopen(config)
    return run


def grid(run, step):
    path = run.samples / f"grid_{step:06}.png"
    Image.new("RGB", (8, 8), (step, 0, 0)).save(path)
    return path


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that died in step 4 with a checkpoint at step 2, was resumed, and finished with an exported model."""
    root = tmp_path_factory.mktemp("runs")
    run = new_run(root, steps=4)
    tracker = Tracker(run, TrackingConfig(), after_step=0)
    for step in (1, 2, 3):
        tracker.metrics(step, {"score/loss": step / 10, "reward": float("nan") if step == 3 else 1.0})
    tracker.image("samples", grid(run, 2), 2)
    with contextlib.suppress(BrokenPipeError):
        tracker._mirrors[0]._process.stdin.close()  # all that the death of this process would change for the other side
    assert tracker._mirrors[0]._process.wait(timeout=300) == 0
    died = json.loads((run.path / "mlflow.json").read_text())

    run = new_run(root, steps=5)
    with Tracker(run, TrackingConfig(), after_step=2) as tracker:
        for step in (3, 4):
            tracker.metrics(step, {"score/loss": step / 10, "reward": 1.0})
        time.sleep(3)  # long enough for the other process to have looked at these records, or not: both must do
        tracker.rewind(3)  # a worker was lost: the job is built anew from a checkpoint at step 3
        for step in (4, 5):
            tracker.metrics(step, {"score/loss": step / 10, "reward": 1.0})
        tracker.image("samples", grid(run, 2), 2)
        tracker.image("samples", grid(run, 5), 5)
        tracker.tag("hack_monitor", "step 4: suspicious")
        (run.export / "unet").mkdir()
        (run.export / "unet" / "config.json").write_text("{}")
        (run.export / "README.md").write_text("# A student\n")
        (run.export / FACTS).write_text("{}")
        (run.path / "report.html").write_text("<!doctype html>")
        tracker.file(run.path / "report.html")
        tracker.model(run.export)
    return run, died


@pytest.fixture(scope="module")
def client(tracked):
    import mlflow

    run, _ = tracked
    mlflow.set_tracking_uri(default_uri(run))
    return mlflow.MlflowClient()


def test_a_resumed_run_is_one_mlflow_run_and_no_step_appears_twice(tracked, client):
    run, died = tracked
    saved = json.loads((run.path / "mlflow.json").read_text())
    assert saved == died
    (found,) = client.search_runs([client.get_experiment_by_name("flashdmd_ray").experiment_id])
    assert found.info.run_id == saved["run_id"]
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    history = client.get_metric_history(saved["run_id"], "score/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step / 10) for step in range(1, 6)]
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3, 4, 5]


def test_the_configuration_is_logged_and_what_a_resume_changed_is_a_tag(tracked, client):
    _, died = tracked
    data = client.get_run(died["run_id"]).data
    assert data.params["score.ema"] == "0.98"
    assert data.params["rewards.0.kind"] == "pickscore"
    assert data.params["steps"] == "4"
    assert data.tags["resumed.steps"] == "5"
    assert data.tags["hack_monitor"] == "step 4: suspicious"
    assert "student of demo (sdxl), started for 4 steps" in data.tags["mlflow.note.content"]
    assert f"`flashdmd train {tracked[0].path / 'config.yaml'}`" in data.tags["mlflow.note.content"]


def test_grids_are_logged_once_and_the_page_is_an_artifact(tracked, client):
    _, died = tracked
    assert "report.html" in [item.path for item in client.list_artifacts(died["run_id"])]
    names = [item.path for item in client.list_artifacts(died["run_id"], "images") if item.path.endswith(".png")]
    assert sorted(name.split("+timestamp")[0] for name in names) == ["images/samples+step+2", "images/samples+step+5"]


def test_the_export_with_its_card_is_the_newest_registered_version(tracked, client, tmp_path):
    import mlflow

    _, died = tracked
    version = client.get_model_version_by_alias("flashdmd_ray", "newest")
    assert version.run_id == died["run_id"]
    assert version.description == "# A student\n"
    folder = mlflow.artifacts.download_artifacts("models:/flashdmd_ray@newest", dst_path=str(tmp_path))
    assert sorted(os.listdir(folder)) == ["README.md", FACTS, "unet"]


def test_a_service_fetches_the_registered_version(tracked, client, tmp_path):
    run, _ = tracked
    source = open_source("models:/flashdmd_ray@newest", default_uri(run))
    assert source.signature() == "version 1"
    source.fetch(tmp_path, timeout_s=60)
    assert sorted(os.listdir(tmp_path)) == ["README.md", FACTS, "unet"]
    with pytest.raises(ValueError, match="is not in the registry"):
        open_source("models:/flashdmd_ray@champion", default_uri(run)).signature()


def test_files_lie_beside_the_runs_and_nowhere_else(tracked):
    run, _ = tracked
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["first", "mlflow-artifacts", "mlflow.db"]


def test_a_server_that_refuses_costs_one_warning(tmp_path, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    run = new_run(tmp_path)
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        Tracker(run, TrackingConfig(uri=f"http://127.0.0.1:{port}"), after_step=0) as tracker,
    ):
        tracker.metrics(1, {"score/loss": 0.1})
        assert time.monotonic() - started < 5, "training does not wait for MLflow"
    assert len(caplog.messages) == 1
    assert "MLflow" in caplog.messages[0]
    assert read_metrics(run.metrics) == [{"step": 1, "score/loss": 0.1}]


def test_a_server_that_never_answers_is_left_behind(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tracking, "SILENCE_S", 1.0)
    run = new_run(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING):
        tracker = Tracker(run, TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), after_step=0)
        process = tracker._mirrors[0]._process
        started = time.monotonic()
        tracker.finish("failed")
        tracker.finish("failed")
    assert time.monotonic() - started < 10
    assert process.returncode is not None, "nothing is left running"
    assert len(caplog.messages) == 1


def test_without_mlflow_only_the_run_folder_is_written(tmp_path):
    run = new_run(tmp_path)
    with Tracker(run, TrackingConfig(enabled=False), after_step=0) as tracker:
        tracker.metrics(1, {"score/loss": 0.1})
        tracker.image("samples", grid(run, 1), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "export",
        "metrics.jsonl",
        "samples",
        "versions.json",
    ]


def test_importing_the_tracker_imports_neither_torch_nor_mlflow():
    import subprocess
    import sys

    code = "import sys, flashdmd_ray.run.tracking, flashdmd_ray.run.progress; print(sorted({'torch', 'mlflow', 'ray'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
