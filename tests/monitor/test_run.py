"""A real run towards a reward that is hacked at once: what it leaves behind, and how it ends."""

import json
from pathlib import Path

import pytest
from PIL import Image

from flashdmd_ray.checkpoint import manifests, read_state, select_checkpoint
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.run.metrics_log import read_metrics
from flashdmd_ray.training import job


def hackable(root: Path, **monitor: object) -> Config:
    """Preference updates alone, towards brightness, without a reference that holds, at a rate that ruins the images within a few steps."""
    brightness = {"kind": "custom", "name": "brightness", "path": "brightness:Brightness"}
    return parse_config(
        {
            "steps": 30,
            "batch": 2,
            "runtime": "local",
            "run": {"dir": str(root), "name": "hacked"},
            "preference": {"distill": False, "updates": 1, "batch": 4, "lr": 5e-4, "warmup": 0, "beta": 0.005},
            "rewards": [brightness, {"kind": "pickscore", "held_out": True}],
            "monitor": {"warmup": 2, "window": 2, **monitor},
            "checkpoint": {"every": 1, "keep": 1},
            "tracking": {"enabled": False, "samples_every": 100},
            "evaluation": {"samples": 0},
        }
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def stopped(root) -> Path:
    assert job.run_job(hackable(root, action="stop")) == job.STOPPED_BY_MONITOR == 3
    return root / "hacked"


def test_a_hacked_run_stops_with_its_healthy_checkpoint(stopped, capsys):
    records = read_metrics(stopped / "metrics.jsonl")
    verdicts = [record["monitor/verdict"] for record in records]
    assert verdicts[:2] == [0, 0]
    assert verdicts[-1] == 2, "it stops at the first verdict of hacking"
    assert 2 not in verdicts[:-1]
    assert records[-1]["monitor/rise/brightness"] > 0.05
    assert records[-1]["monitor/held_out_gap"] > 1
    kept = {m.step: m.metrics["monitor/verdict"] for m in manifests(stopped / "checkpoints")}
    assert max(kept) == len(records) - 1, "none is written of the step that was found hacked"
    healthy = select_checkpoint(stopped / "checkpoints", "healthy", None)
    assert kept[read_state(healthy)["step"]] == 0
    assert not (stopped / "report.json").exists()


def test_the_evidence_shows_the_same_prompts_before_and_now(stopped):
    grids = sorted((stopped / "monitor").glob("step-*.png"))
    assert grids
    with Image.open(grids[-1]) as grid, Image.open(stopped / "monitor" / "start.png") as start:
        assert start.size == (10 * 24, 2 * 24), "all four steps above the first two"
        assert grid.size[0] > 1000
        assert grid.size[1] > 4 * 120


def test_told_to_report_the_same_command_goes_on(root, stopped, capsys):
    steps = len(read_metrics(stopped / "metrics.jsonl"))
    config = hackable(root, action="report").model_copy(update={"steps": steps + 1})
    assert job.run_job(config) == 0
    said = capsys.readouterr().out
    assert f"hack monitor, step {steps}: hacking: gap between optimised and held-out rewards rose" in said
    written = json.loads((stopped / "report.json").read_text())
    assert written["hack_monitor"]["level"] == "hacking"
    assert "monitor" not in written["training"]
    assert "The hack monitor's verdict on the training: hacking: gap" in (stopped / "export" / "README.md").read_text()
