"""SIGKILL at every file operation of a save and at random moments, and full disks: the newest checkpoint is complete, and the right one."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashdmd_ray.checkpoint import latest_checkpoint, load_tensors, manifests, read_state, verify_checkpoint
from flashdmd_ray.run.storage import RemotePath, children
from tests.checkpoint.writing import write

PROGRAM = Path(__file__).with_name("killed_writer.py")
STYLES = ["rename", "manifest"]
"""The two ways to commit: a file system, and a folder used like an object store."""


@pytest.fixture(scope="module")
def writer():
    """ask(order): see killed_writer.py."""
    process = subprocess.Popen([sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(folder, style, **order):
        process.stdin.write(json.dumps(order | {"root": str(folder), "remote": style == "manifest"}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return answer, RemotePath(f"file://{folder}") if style == "manifest" else folder

    yield ask
    process.stdin.close()
    assert process.wait(300) == 0


def check(root, reported):
    """The newest is the last reported one or the one after it; all that are listed are complete and hold their own step's weights."""
    newest = latest_checkpoint(root)
    assert read_state(newest)["step"] in (reported, reported + 1)
    found = manifests(root)
    assert len(found) >= 2, "keep is 2 and two were complete before"
    for manifest in found:
        verify_checkpoint(manifest.folder)
        for part in ("a", "b"):
            weights = load_tensors(manifest.folder / f"{part}.safetensors")["w"]
            assert torch.equal(weights, torch.full_like(weights, manifest.step))


@pytest.mark.parametrize("style", STYLES)
def test_kill_before_every_file_operation_of_a_save(writer, tmp_path, style):
    newest, at = [], 0
    while True:
        at += 1
        answer, root = writer(tmp_path / str(at), style, at=at)
        assert not answer["errors"]
        check(root, answer["reported"])
        newest.append(read_state(latest_checkpoint(root))["step"])
        after = write(root, 9, keep=1)  # the next save clears away what the kill left
        assert [child.name for child in children(root)] == [after.name]
        if not answer["killed"]:
            break
    assert at > 20, "the hook saw the operations of the save"
    assert newest == sorted(newest), "there is one moment at which the new one becomes the newest"
    assert {newest[0], newest[-1]} == {2, 3}
    assert newest[-2] == 3, "retention comes after the commit"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("repetition", range(12))
def test_kill_at_any_moment(writer, tmp_path, style, repetition):
    after = random.Random(repetition).uniform(0.0, 0.1)
    answer, root = writer(tmp_path / "c", style, after_s=after)
    assert answer["killed"]
    check(root, answer["reported"])


@pytest.mark.parametrize("style", STYLES)
def test_a_full_disk_is_named_and_leaves_the_previous_one(writer, tmp_path, style):
    answer, root = writer(tmp_path / "c", style, largest_file=65536)
    assert not answer["killed"]
    (error,) = answer["errors"]
    assert error.startswith("CheckpointError: the checkpoint of step 3 could not be written (OSError: a.safetensors: ")
    assert "File too large" in error
    assert error.endswith("Make room, or set checkpoint.dir to another place")
    check(root, 2)
    assert read_state(latest_checkpoint(root))["step"] == 2
