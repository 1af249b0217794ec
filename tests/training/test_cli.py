"""The command line: what a user can get wrong is one line and exit code 2, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashdmd_ray.config import Config, load_config
from flashdmd_ray.training import cli
from tests.model_folders import model_settings

ROOT = Path(__file__).parents[2]
JOB = ROOT / "jobs" / "joint_train.py"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(model_settings(tmp_path / "world")))
    return path


def files(folder):
    return sorted(str(path) for path in folder.rglob("*"))


BAD_SETTINGS = {
    "unknown key": ("stepz=3", "stepz: unknown key, did you mean 'steps'?"),
    "unknown nested key": ("preference.betta=1", "preference.betta: unknown key, did you mean 'beta'?"),
    "wrong type": ("steps=many", "steps: "),
    "not a whole number": ("batch=2.5", "batch: "),
    "one candidate": ("preference.candidates=1", "preference.candidates: "),
    "timesteps not descending": (
        "sampling.timesteps=[249,999]",
        "sampling.timesteps: must be a strictly descending list",
    ),
    "beta not positive": ("preference.beta=0", "preference.beta: "),
    "TTUR 0": ("ttur=0", "ttur: "),
    "more ranks than batch": ("placement.learner.workers=64", "placement.learner.workers: "),
    "unknown reward": (
        "rewards=[{kind: pikscore}]",
        "rewards.0.kind: unknown reward 'pikscore', did you mean 'pickscore'?",
    ),
    "run name that leaves the folder": ("run.name=../elsewhere", "run.name: "),
    "empty run name": ("run.name=''", "run.name: "),
    "run folder that cannot be written": ("run.dir=/proc/runs", "run.dir: cannot write"),
    "weights that are not there": ("model.teacher=/no/where", "model.teacher: no such directory: '/no/where'"),
    "no value": ("steps", "--set steps: expected key=value"),
}


@pytest.mark.parametrize("what", BAD_SETTINGS)
def test_bad_settings_are_one_clear_line_and_leave_nothing(what, config_file, tmp_path, capsys):
    setting, message = BAD_SETTINGS[what]
    before = files(tmp_path)
    assert cli.main([str(config_file), "--set", setting]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1, "one line"
    assert out == ""
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [(": :", "not valid YAML"), ("- 1", "expected keys and values"), (None, "cannot read the configuration")],
)
def test_bad_configuration_files(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    assert cli.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_damaged_weights_in_a_real_process(config_file, tmp_path):
    weights = tmp_path / "world" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    before = files(tmp_path)
    answer = subprocess.run(
        [sys.executable, JOB, config_file], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert (
        answer.stderr
        == f"error: model.teacher: {weights} is damaged (not a complete safetensors file); download or make it again\n"
    )
    assert "Traceback" not in answer.stdout
    assert files(tmp_path) == before


def test_dry_run_prints_configuration_and_plan_without_torch(config_file, tmp_path):
    before = files(tmp_path)
    code = (
        "import sys; from flashdmd_ray.training.cli import main; code = main(sys.argv[1:])\n"
        "print('heavy:', sorted({'torch', 'ray', 'diffusers', 'mlflow'} & set(sys.modules))); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, config_file, "--set", "steps=7", "--dry-run"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    text, _, rest = answer.stdout.partition("settings that differ from the defaults\n")
    printed, _, heavy = rest.partition("heavy: ")
    assert heavy == "[]\n"
    read = Config.model_validate(yaml.safe_load(printed))
    assert read == load_config(config_file, ["steps=7"]), "what is printed is the configuration"
    for word in ("roles", "placement", "schedule", "score estimator", "memory in all", "7 steps"):
        assert word in text
    assert files(tmp_path) == before


def test_help_of_every_command_imports_nothing_heavy(tmp_path):
    code = (
        "import contextlib, sys; from flashdmd_ray.__main__ import COMMANDS, main\n"
        "groups = {name: entry if isinstance(entry, dict) else [None] for name, entry in COMMANDS.items()}\n"
        "for words in [*([name, part] for name, parts in groups.items() for part in parts), ['config', 'new']]:\n"
        "    with contextlib.suppress(SystemExit): main([*filter(None, words), '--help'])\n"
        "print('heavy:', sorted({'torch', 'ray', 'diffusers', 'mlflow'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("heavy: []\n")
    assert answer.stdout.count("usage: flashdmd ") == 14


def test_files_that_are_whole_but_no_model_are_one_line_when_loading_finds_out(config_file, tmp_path, capfd):
    assert cli.main([str(config_file), "--set", "runtime=local", "tracking.enabled=false"]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: cannot load")
    assert "Traceback" not in out
    assert not (tmp_path / "world" / "runs" / "first").exists(), "nothing half-written"


def test_what_is_slow_before_a_run_says_that_it_goes_on(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flashdmd_ray.run.progress.QUIET_S", 1e-4)
    settings = ["data.source=absent", f"run.dir={tmp_path}", "runtime=local"]
    assert cli.main([str(config_file), "--set", *settings]) == 2
    assert "still looking at models and data" in capsys.readouterr().out
