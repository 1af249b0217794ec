"""The HTML page of finished runs: it stands alone, shows the figures that were measured, and compares runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from flashdmd_ray.commands.report import report_command
from flashdmd_ray.config import dump_config, parse_config
from flashdmd_ray.results.evaluation import margin, wins

ROWS = [
    {"name": "real images", "nfe": 0, "samples": 500, "frechet": 9.5, "accuracy": 0.99, "rewards": {"pickscore": 27.1}, "diversity": 37.0},
    {"name": "teacher, 25 steps", "nfe": 50, "samples": 500, "frechet": 21.4, "accuracy": 0.985, "rewards": {"pickscore": 27.6}},
    {
        "name": "student, 4 steps",
        "nfe": 4,
        "samples": 500,
        "frechet": 19.8,
        "accuracy": 0.975,
        "rewards": {"pickscore": 27.8},
        "margins": {"accuracy": 0.0137, "pickscore": 0.05},
        "wins": {"pickscore": 0.625},
    },
]  # fmt: skip


def a_run(folder: Path, lr: float = 3e-5) -> Path:
    folder.mkdir()
    config = parse_config({"steps": 30, "generator": {"lr": lr}, "run": {"name": "<b>&"}})
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "versions.json").write_text(json.dumps([{"torch": "2.15.0"}]))
    loss = [None if step == 3 else 0.1 for step in range(31)]
    steps = [{"step": step, "reward/pickscore": 27 + step / 50, "score/loss": loss[step]} for step in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    Image.new("RGB", (8, 8)).save(folder / "grid.png")
    counters = {"generator_updates": 30, "score_updates": 30, "preference_updates": 60, "samples": 1200}
    facts = {"rows": ROWS, "prompts": "held-out <scenes>", "space": "features", "optimised": ["pickscore"], "seed": 0}
    facts |= {"training": {"step": 30, "seconds": 3725.0, "counters": counters}, "hack_monitor": {"message": "healthy"}}
    (folder / "report.json").write_text(json.dumps(facts))
    return folder


class Page(HTMLParser):
    """Cells of tables, addresses of what is loaded, and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self._tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self._tags and self._tags[-1] in ("td", "th"):
            self.cells[-1] += data.strip()
        self.text += data


def test_a_page_stands_alone_and_shows_what_was_measured(tmp_path, capsys):
    run = a_run(tmp_path / "demo")
    assert report_command([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    written = (run / "report.html").read_text()
    page = Page(written)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.loaded)
    assert not re.search(r"<script|@import|url\((?!#)", written)
    student = page.cells.index("student, 4 steps")
    assert page.cells[student : student + 7] == [
        "student, 4 steps",
        "4",
        "19.8",
        "0.975 ± 0.014",
        "27.800 ± 0.050",
        "0.625",
        "-",
    ]
    assert "30 generator updates on 1,200 samples and 60 preference updates, 1 h 2 min" in page.text
    assert "With 4 forwards, where the teacher takes 50: Frechet distance 19.8 against the teacher's 21.4" in page.text
    assert "pickscore* 27.800 ± 0.050 against the teacher's 27.600. Hack monitor: healthy." in page.text
    assert "held-out <scenes>" in page.text
    assert "generator: {lr: 3.0e-05}" in page.text
    assert written.count("<svg") == 2, "of the reward and of the score estimator's loss"
    again = written
    assert report_command([str(run)]) == 0
    assert (run / "report.html").read_text() == again


def test_runs_side_by_side(tmp_path):
    first, second = a_run(tmp_path / "first"), a_run(tmp_path / "second", lr=2e-4)
    assert report_command([str(first), str(second), "--out", str(tmp_path / "both.html")]) == 0
    page = Page((tmp_path / "both.html").read_text())
    assert {"first: student, 4 steps", "second: student, 4 steps"} <= set(page.cells)
    assert sum(address.startswith("data:") for address in page.loaded) == 2
    assert "lr: 0.0002" in page.text


def test_a_run_without_table_grid_or_curves_has_a_page(tmp_path):
    run = a_run(tmp_path / "short")
    facts = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(facts | {"rows": [], "hack_monitor": None}))
    (run / "metrics.jsonl").write_text("")
    (run / "grid.png").unlink()
    assert report_command([str(run)]) == 0
    page = Page((run / "report.html").read_text())
    assert page.cells == []
    assert "30 generator updates" in page.text


def test_an_unfinished_run_is_refused(tmp_path, capsys):
    run = a_run(tmp_path / "running")
    (run / "report.json").unlink()
    assert report_command([str(run)]) == 2
    assert report_command([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{run} has no report.json: the run is not finished" in said
    assert f"{tmp_path} is no run folder" in said


def test_margin_and_wins():
    values, others = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 4.0, 3.0])
    assert wins(values, others) == pytest.approx(0.625)
    assert wins(others, values) == pytest.approx(0.375)
    assert margin(values) == pytest.approx(1.96 * (5 / 3) ** 0.5 / 2)
