"""Checkpoints survive kill -9, disks that lie and people who delete files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashdmd_ray.checkpoint import (
    latest_checkpoint,
    load_tensors,
    read_state,
    save_tensors,
    verify_checkpoint,
    write_checkpoint,
)

VALUES = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.ones(2, dtype=torch.bfloat16)}


def save(directory: Path) -> None:
    (directory / "generator").mkdir()
    save_tensors(directory / "generator" / "state.safetensors", VALUES)


def write(root: Path, step: int, keep: int = 10) -> Path:
    return write_checkpoint(root, step, save, state={"step": step}, keep=keep)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path / "checkpoints", 50)
    assert path.name == "step-00000050"
    assert latest_checkpoint(tmp_path / "checkpoints") == path == verify_checkpoint(path)
    assert read_state(path) == {"step": 50}
    loaded = load_tensors(path / "generator" / "state.safetensors")
    assert loaded.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def test_tensors_that_share_memory_or_have_strides_are_saved(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "t.safetensors", {"transposed": base.T, "column": base[:, 1]})
    loaded = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(loaded["transposed"], base.T)
    assert torch.equal(loaded["column"], base[:, 1])


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


def test_retention_keeps_the_last_written(tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    write(tmp_path, 25, keep=1)  # continued from an earlier step: the newest is what was written last
    assert names(tmp_path) == ["step-00000025"]
    assert latest_checkpoint(tmp_path).name == "step-00000025"


def test_the_same_step_again_is_a_new_checkpoint(tmp_path):
    first = write(tmp_path, 10)
    second = write(tmp_path, 10)
    assert first != second
    assert verify_checkpoint(first)
    assert latest_checkpoint(tmp_path) == second
    third = write(tmp_path, 10, keep=1)
    assert names(tmp_path) == [third.name]


@pytest.mark.parametrize("victim", ["generator/state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_skipped(tmp_path, caplog, victim, damage):
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    file = bad / victim
    if damage == "flip":
        flip_a_byte(file)
    elif damage == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    assert latest_checkpoint(tmp_path) == good
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert victim in record.message
    assert str(bad) in record.message
    assert "delete" in record.message
    with pytest.raises(ValueError, match=victim) as caught:
        verify_checkpoint(bad)
    assert "\n" not in str(caught.value)


def test_retention_never_counts_on_a_directory_without_a_manifest(tmp_path):
    bad = write(tmp_path, 10)
    (bad / "manifest.json").unlink()
    newest = write(tmp_path, 20, keep=1)
    assert verify_checkpoint(newest)
    assert latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"format": 2, "serial": 1, "files": {}}',
        '{"format": 1, "serial": 1, "files": {"a": {}}}',
    ],
)
def test_manifests_of_any_shape_are_refused_with_one_line(tmp_path, text):
    path = write(tmp_path, 10)
    (path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json"):
        verify_checkpoint(path)


def test_a_checkpoint_named_by_the_user(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere"):
        verify_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"cannot read state.json"):
        read_state(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"not tensors")
    for name in ("x.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=name):
            load_tensors(tmp_path / name)


def test_a_failing_writer_leaves_nothing(tmp_path):
    good = write(tmp_path, 10)

    def fail(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, 20, fail, state={}, keep=1)
    assert names(tmp_path) == [good.name]


WRITER = """
import sys, time
from pathlib import Path
from flashdmd_ray.checkpoint import write_checkpoint

def save(directory):
    for part in range(20):
        (directory / f"part{part}").write_bytes(step.to_bytes(4, "big") * 2000)
        if step == int(sys.argv[2]):
            print("half", flush=True)
            time.sleep(60)

for step in range(1, 100000):
    write_checkpoint(Path(sys.argv[1]), step, save, state={"step": step}, keep=2)
    print(step, flush=True)
"""


def start_writer(root: Path, stop_inside: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(stop_inside)], stdout=subprocess.PIPE, text=True
    )


def test_kill_in_the_middle_of_a_write_leaves_the_previous(tmp_path, caplog):
    with start_writer(tmp_path, stop_inside=3) as process:
        assert [process.stdout.readline().strip() for _ in range(3)] == ["1", "2", "half"]
        process.send_signal(signal.SIGKILL)
    leftover = [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert len(leftover) == 1
    assert any(leftover[0].iterdir())
    assert latest_checkpoint(tmp_path).name == "step-00000002"
    assert not caplog.records
    write(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path, caplog):
    """Killed at random times in a tight loop of writes: what was reported as written is there, complete, and no warning is due."""
    random.seed(0)
    with start_writer(tmp_path, stop_inside=0) as process:
        process.stdout.readline()
        time.sleep(random.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        reported = [1, *(int(line) for line in process.stdout)][-1]
    step = read_state(latest_checkpoint(tmp_path))["step"]
    assert step in (reported, reported + 1)
    assert not caplog.records
    json.loads((latest_checkpoint(tmp_path) / "manifest.json").read_text())
