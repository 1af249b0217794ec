"""TensorBoard and W&B with their real libraries: a run that was resumed is there once, with its grids and its text."""

from __future__ import annotations

import contextlib
import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashdmd_ray.config import Config
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.tracking import Tracker

BOTH = {"enabled": False, "tensorboard": True, "wandb": "team/distillation"}


def new_run(root: Path, **tracking: object) -> tuple[RunDirectory, Config]:
    config = Config.model_validate({"run": {"dir": str(root), "name": "first"}, "tracking": tracking})
    run = RunDirectory.prepare(config.run, config)
    run.reopen(config)
    return run, config


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that died in step 3 with a checkpoint at step 2, was resumed, and finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run, config = new_run(tmp_path_factory.mktemp("runs"), **BOTH)
        grid = run.samples / "step-2.png"
        Image.new("RGB", (8, 6), (200, 0, 0)).save(grid)
        tracker = Tracker(run, config.tracking, after_step=0)
        for step in (1, 2, 3):
            tracker.metrics(step, {"score/loss": step / 4, "reward": float("nan")})
        tracker.image("samples", grid, 2)
        for mirror in tracker._mirrors:
            with contextlib.suppress(BrokenPipeError):
                mirror._process.stdin.close()  # type: ignore[union-attr] # all that a death would change for the other side
        assert [mirror._process.wait(timeout=300) for mirror in tracker._mirrors] == [0, 0]
        with Tracker(run, config.tracking, after_step=2) as tracker:
            for step in (3, 4):
                tracker.metrics(step, {"score/loss": step / 4, "reward": 1.0})
            tracker.image("samples", grid, 2)
            tracker.tag("hack_monitor", "step 4: suspicious")
            (run.path / "report.html").write_text("<!doctype html>")
            tracker.file(run.path / "report.html")
    return run


def test_tensorboard_shows_every_step_once_and_the_grid(tracked: RunDirectory) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    there = EventAccumulator(str(tracked.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in there.Scalars("score/loss")] == [(step, step / 4) for step in (1, 2, 3, 4)]
    (image,) = there.Images("samples")
    assert (image.step, image.width, image.height) == (2, 8, 6)
    (text,) = there.Tensors("hack_monitor")
    assert text.tensor_proto.string_val == [b"step 4: suspicious"]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run's file, which `wandb sync` would send: a LevelDB log of one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place = file.read_bytes(), 7
    assert len(data) < 2**15, "one block"
    while place < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        assert kind == 1, "whole"
        yield Record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length


def items(update: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}


def test_wandb_has_every_step_once_the_grid_and_the_configuration(tracked: RunDirectory) -> None:
    files = sorted(tracked.path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2, "before and after the resume"
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    saved = json.loads((tracked.path / "wandb.json").read_text())
    assert {(run.run_id, run.entity, run.project, run.display_name) for run in runs} == {
        (saved["id"], "team", "distillation", "first")
    }
    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert [(h["step"], h["score/loss"]) for h in history if "score/loss" in h] == [(s, s / 4) for s in (1, 2, 3, 4)]
    assert [h["step"] for h in history if any(key.startswith("samples") for key in h)] == [2]
    assert len(list(tracked.path.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1
    (page,) = tracked.path.glob("wandb/offline-run-*/files/report.html")
    assert page.read_text() == "<!doctype html>"
    config = {k: v for r in records if r.HasField("config") for k, v in items(r.config.update).items()}
    assert config["score.ema"] == 0.98
    summary = {k: v for r in records if r.HasField("summary") for k, v in items(r.summary.update).items()}
    assert summary["hack_monitor"] == "step 4: suspicious"


def test_wandb_without_an_account_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    run, config = new_run(tmp_path / "runs", enabled=False, wandb="distillation")
    with caplog.at_level(logging.WARNING), Tracker(run, config.tracking, after_step=0) as tracker:
        tracker.metrics(1, {"score/loss": 0.5})
    (message, *rest) = caplog.messages
    assert "Weights & Biases" in message
    assert not rest
    assert run.metrics.read_text() == '{"step": 1, "score/loss": 0.5}\n'
