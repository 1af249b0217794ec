"""The report of a run on data of one's own: judged by rewards and their view of images, or by nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashdmd_ray.commands.evaluate import evaluate_command
from flashdmd_ray.commands.export import export_command
from flashdmd_ray.config import Config, load_config, parse_config
from flashdmd_ray.results.comparison import pixel_rewards
from flashdmd_ray.results.sample_grid import COLUMNS
from flashdmd_ray.training import job
from tests.data.scenes_on_disk import samples, write_folder
from tests.tiny import save_sdxl


def small(root: Path, name: str, *changes: str) -> Config:
    return load_config(
        None,
        [
            *("steps=1", "batch=2", "runtime=local", f"run.dir={root}", f"run.name={name}", "tracking.enabled=false"),
            *("preference.updates=1", "preference.batch=2", "preference.candidates=2", f"data.cache={root / 'cache'}"),
            *("evaluation.samples=5", "evaluation.teacher_steps=1", "evaluation.student_steps=[4]"),
            *changes,
        ],
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def captions(root) -> tuple[str, ...]:
    """Of the image folder `images`, in which four of five samples find a real image."""
    data = samples(4)
    write_folder(root / "images", data)
    return tuple(caption for caption, _ in data)


@pytest.fixture(scope="module")
def finished(root, captions) -> Path:
    assert job.run_job(small(root, "own", f"data.source={root / 'images'}", "evaluation.batch=2")) == 0
    return root / "own"


def test_data_of_one_s_own_are_judged_by_rewards_and_their_view_of_images(finished, captions):
    report = json.loads((finished / "report.json").read_text())
    assert (report["prompts"], report["space"]) == ("prompts of training", "image embeddings of pickscore")
    assert report["optimised"] == ["pickscore"]
    assert [row["name"].split(",")[0] for row in report["rows"]] == ["teacher", "before", "student"]
    for row in report["rows"]:
        assert row.keys() == {"name", "nfe", "samples", "rewards", "diversity", "margins", "wins"}, (
            "no distance of 5 samples"
        )
        assert row["samples"] == 5
        assert row["rewards"].keys() == {"pickscore"}, "the latent reward does not look at images"
        assert 0 < row["diversity"] < 2, "between vectors of unit length"
    assert len(report["grid"]) == COLUMNS
    assert set(report["grid"]) == set(captions)
    assert (finished / "samples" / "step-000001.png").is_file()
    card = (finished / "export" / "README.md").read_text()
    assert "5 prompts of training. `nfe`: network forwards per sample." in card
    assert "accuracy" not in card


def test_the_commands_say_what_the_report_said(finished, capsys):
    assert evaluate_command([str(finished), "--samples", "5"]) == 0
    again = json.loads((finished / "evaluation.json").read_text())
    report = json.loads((finished / "report.json").read_text())
    assert again["student"] == "export"
    assert again["rows"] == report["rows"]
    said = " ".join(capsys.readouterr().out.split())
    assert "5 prompts of training; distances between image embeddings of pickscore;" in said
    card = (finished / "export" / "README.md").read_text()
    assert export_command([str(finished), "--out", str(finished / "again")]) == 0
    assert (finished / "again" / "README.md").read_text() == card


def test_prompts_of_a_file_and_no_table(root, captions, capsys):
    (root / "wanted.txt").write_text("a red 4\na ship in a storm\n")
    config = small(
        root,
        "no-table",
        f"data.source={root / 'images'}",
        f"evaluation.prompts={root / 'wanted.txt'}",
        "evaluation.samples=0",
    )
    assert job.run_job(config) == 0
    run = root / "no-table"
    assert "no table: evaluation.samples is 0" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    assert report["rows"] == []
    assert report["grid"] == 5 * ["a red 4", "a ship in a storm"]
    assert (run / "grid.png").is_file()
    card = (run / "export" / "README.md").read_text()
    assert "## Measured" not in card
    assert "| a ship in a storm |" in card


def test_what_cannot_be_evaluated_is_refused_before_training(root):
    with pytest.raises(
        ValueError, match=r"evaluation.samples: a distance between distributions needs at least 2 samples"
    ):
        parse_config({"evaluation": {"samples": 1}})
    from flashdmd_ray.plan import check

    with pytest.raises(ValueError, match=r"evaluation.prompts: no such file: nowhere.txt"):
        check(parse_config({"evaluation": {"prompts": "nowhere.txt"}, "run": {"dir": str(root)}}))


def test_the_packaged_reward_judges_other_teachers_only_when_they_are_trained_on_it():
    def labels(**changes: object) -> list[str]:
        rewards = [
            {"kind": "pickscore"},
            {"kind": "pickscore", "name": "mine", "path": "a/b", "held_out": True},
            {"kind": "latent"},
        ]
        return [reward.label for reward in pixel_rewards(parse_config({"rewards": rewards} | changes))]

    assert labels() == ["pickscore", "mine"]
    assert labels(model={"teacher": "x/y"}, preference={"updates": 0}) == ["mine"]
    assert labels(model={"teacher": "x/y"}, preference={"updates": 1}) == ["pickscore", "mine"]


EXPORT = """
import sys
from pathlib import Path
from flashdmd_ray.results.export import export_pipeline
from flashdmd_ray.results.model_card import CardFacts
from flashdmd_ray.models.sdxl import SDXL
family = SDXL.from_pretrained(sys.argv[1])
export_pipeline(family, family.teacher.state_dict(), (999, 499), Path(sys.argv[2]), CardFacts("n", "b", "other", {}, ()))
assert "deepspeed" in sys.modules, "then there is nothing to silence any more"
"""


def test_an_export_prints_nothing(tmp_path):
    """accelerate imports DeepSpeed while a pipeline is saved, which announces its choice of a device."""
    teacher = save_sdxl(tmp_path / "teacher")
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(teacher), str(tmp_path / "export")],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "real_accelerator" not in done.stdout + done.stderr
