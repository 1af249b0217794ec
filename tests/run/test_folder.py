"""The run folder: refusals leave no trace, a folder appears whole, metrics survive a crash without doubles."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from flashdmd_ray.config import Config
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.metrics_log import MetricsLog, read_metrics
from flashdmd_ray.run.settings import flatten


def config_of(root, name, **changes):
    tree = {"seed": 1, "steps": 10, "rewards": [{"kind": "pickscore"}], "run": {"dir": str(root), "name": name}}
    return Config.model_validate(tree | changes)


def prepare(root, name, **changes):
    config = config_of(root, name, **changes)
    run = RunDirectory.prepare(config.run, config)
    run.reopen(config)
    return run


def names_below(path):
    return sorted(found.relative_to(path).as_posix() for found in path.rglob("*"))


def test_new_run_has_config_versions_and_folders(tmp_path):
    config = config_of(tmp_path / "deep" / "runs", "first")
    run = RunDirectory.prepare(config.run, config)
    assert names_below(run.path) == ["checkpoints", "config.yaml", "export", "samples", "versions.json"]
    assert names_below(tmp_path / "deep" / "runs")[0] == "first", "nothing beside the run"
    assert Config.model_validate(yaml.safe_load(run.config.read_text())) == config, (
        "the saved configuration can be run again"
    )
    (versions,) = json.loads(run.versions.read_text())
    assert versions["python"].startswith("3.")
    assert versions["torch"]


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "../x", "/tmp/x", "a..b", ".hidden", "a\nb", "a\0b"]
)
def test_names_that_are_no_plain_folder_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must be a plain folder name"):
        prepare(tmp_path / "runs", name)
    assert names_below(tmp_path) == []


@pytest.mark.parametrize("obstacle", ["a file in the way", "a read-only file system"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, obstacle):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" if obstacle == "a file in the way" else "/proc/runs"
    with pytest.raises(
        ValueError, match=r"run\.dir: cannot write .*; set run\.dir to a folder you can write$"
    ) as refusal:
        prepare(root, "first")
    assert "\n" not in str(refusal.value)
    assert names_below(tmp_path) == ["file"]


def test_check_leaves_no_trace(tmp_path):
    config = config_of(tmp_path / "not" / "yet", "first")
    run = RunDirectory.check(config.run, config)
    assert not run.exists
    assert names_below(tmp_path) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with pytest.raises(ValueError, match="is not a run folder"):
        prepare(tmp_path, "photos")
    assert names_below(tmp_path) == ["photos", "photos/cat.png"]


def test_reopening_with_the_same_configuration_keeps_everything(tmp_path):
    run = prepare(tmp_path, "first")
    (run.samples / "grid.png").write_text("x")
    again = prepare(tmp_path, "first", steps=20)
    assert (again.samples / "grid.png").read_text() == "x"
    assert yaml.safe_load(again.config.read_text())["steps"] == 20
    assert len(json.loads(again.versions.read_text())) == 1, "the same environment is noted once"


def test_reopening_with_a_configuration_that_computes_something_else_is_refused(tmp_path):
    run = prepare(tmp_path, "first")
    before = run.config.read_text()
    with pytest.raises(ValueError, match=r"seed was 1 and is now 2; rewards\.0\.weight was 1\.0 and is now 0\.5"):
        prepare(tmp_path, "first", seed=2, rewards=[{"kind": "pickscore", "weight": 0.5}])
    assert run.config.read_text() == before


def test_a_run_that_recorded_nothing_can_be_discarded_and_another_one_not(tmp_path):
    unused, used = prepare(tmp_path, "unused"), prepare(tmp_path, "used")
    (used.checkpoints / "step-00000001").mkdir()
    for run in (unused, used):
        run.discard_unused()
    assert not unused.path.exists()
    assert used.exists


def test_metrics_of_repeated_steps_and_torn_lines_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, after_step=0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": step / 10})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # the process died here
    log = MetricsLog(path, after_step=2)
    log.write(3, {"loss": 0.7})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.2},
        {"step": 3, "loss": 0.7},
    ]
    log.close()


def test_metrics_are_on_disk_when_write_returns(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from flashdmd_ray.run.metrics_log import MetricsLog\n"
        "MetricsLog(Path(sys.argv[1]), 0).write(1, {'loss': 0.5, 'worse': float('nan')}); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "metrics.jsonl"
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    assert read_metrics(path) == [{"step": 1, "loss": 0.5, "worse": None}]


def test_metrics_without_room_wait_for_it(tmp_path):
    """A limit on the size of files is what the kernel offers here in place of a full disk."""
    script = """
import resource, signal, sys
from pathlib import Path
from flashdmd_ray.run.metrics_log import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(Path(sys.argv[1]), 0)
for step in range(1, 9):
    resource.setrlimit(resource.RLIMIT_FSIZE, (70 if step in (3, 4, 5) else 10**6, resource.RLIM_INFINITY))
    log.write(step, {"loss": 0.5})
    if step == 5:
        log.rewind(4)
        log.write(5, {"loss": 0.6})
"""
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 9))
    assert read_metrics(path)[4]["loss"] == 0.6
    assert done.stderr.count("its records wait in memory") == 1


def test_flatten_names_every_leaf():
    assert flatten({"a": {"b": 1}, "c": [1, 2], "d": [{"e": 3}], "f": {}}) == {
        "a.b": 1,
        "c": [1, 2],
        "d.0.e": 3,
        "f": {},
    }


def test_every_setting_that_a_step_computes_with_must_stay(tmp_path):
    """One value of each kind of mark: a setting of its own, a whole section, one setting of a section."""
    prepare(tmp_path, "first")
    for name, change in (
        ("steps", {"steps": 20}),
        ("deadlines", {"deadlines": {"attempts": 9}}),
        ("engine.accumulation", {"engine": {"accumulation": 2}}),
    ):
        assert prepare(tmp_path, "first", **change).exists, name
    for name, change in (
        ("batch", {"batch": 16}),
        ("engine.precision", {"engine": {"precision": "bfloat16"}}),
        ("checkpoint.dir", {"checkpoint": {"dir": str(tmp_path / "elsewhere")}}),
    ):
        with pytest.raises(ValueError, match=rf"{re.escape(name)} was .* and is now"):
            prepare(tmp_path, "first", **change)
