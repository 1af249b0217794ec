"""What is written is read back, in a file system and in a store; damage is noticed; retention keeps what it promises."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdmd_ray.checkpoint import (
    Best,
    DamagedCheckpoint,
    latest_checkpoint,
    latest_step,
    load_tensors,
    manifests,
    newest_whole,
    pass_over,
    read_state,
    save_tensors,
    select_checkpoint,
    verify_checkpoint,
)
from flashdmd_ray.run.storage import RemotePath, children
from tests.checkpoint.writing import LOWEST, PART, VALUES, place, store, write

KINDS = ["local", "memory", "remote"]


@pytest.fixture(params=KINDS)
def root(request, tmp_path):
    return place(request.param, tmp_path)


def names(root):
    return [child.name for child in children(root)]


def steps(root):
    return [manifest.step for manifest in manifests(root)]


def same(loaded, values):
    return loaded.keys() == values.keys() and all(
        loaded[n].dtype == v.dtype and torch.equal(loaded[n], v) for n, v in values.items()
    )


def test_what_is_written_is_read_back(root):
    path = write(root, 50)
    assert path.name == "step-00000050"
    assert latest_checkpoint(root) == path == verify_checkpoint(path)
    assert latest_step(root) == 50
    assert read_state(path) == {"step": 50}
    assert same(load_tensors(path / PART), VALUES)
    assert {name.rpartition(".")[2] for name in names(path)} == {"json", "safetensors"}


def test_the_umask_decides_who_may_read_a_checkpoint(tmp_path):
    before = os.umask(0o027)
    try:
        path = write(place("local", tmp_path), 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_every_kind_of_place_gets_the_same_bytes(tmp_path):
    written = [write(place(kind, tmp_path), 7) for kind in KINDS]
    first, *others = [
        {name: (path / name).read_bytes() for name in (PART, "state.json", "manifest.json")} for path in written
    ]
    assert others == [first, first]


def test_tensors_that_share_memory_or_have_strides_are_saved(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_tensors(tmp_path / "t.safetensors", {"transposed": base.T, "column": base[:, 1]})
    assert same(load_tensors(tmp_path / "t.safetensors"), {"transposed": base.T, "column": base[:, 1]})


def test_no_checkpoint_yet(root):
    assert latest_checkpoint(root) is None
    assert latest_step(root) == 0
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        select_checkpoint(root, "latest", None)


def test_retention_keeps_the_last_written(root):
    for step in (10, 20, 30, 40):
        write(root, step, keep=2)
    assert names(root) == ["step-00000030", "step-00000040"]
    write(root, 25, keep=1)  # continued from an earlier step: the newest is what was written last
    assert names(root) == ["step-00000025"]


def test_the_same_step_again_is_a_new_checkpoint(root):
    first = write(root, 10)
    second = write(root, 10)
    assert first != second
    assert verify_checkpoint(first)
    assert latest_checkpoint(root) == second
    third = write(root, 10, keep=1)
    assert names(root) == [third.name]


@given(
    gaps=st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan]), min_size=1, max_size=8),
    keep=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
@settings(max_examples=25, deadline=None)
def test_the_newest_and_the_best_stay_and_nothing_else(tmp_path_factory, gaps, keep, mode):
    """After any history: exactly the `keep` newest and, of the checkpoints that were ever best, the one that is."""
    root = place("memory", tmp_path_factory.getbasetemp())
    best = Best("gap", mode)
    for step, gap in enumerate(gaps, start=1):
        write(root, step, keep, best, {"gap": gap})
    expected = set(range(max(1, len(gaps) - keep + 1), len(gaps) + 1))
    finite = [(gap if mode == "min" else -gap, -step) for step, gap in enumerate(gaps, start=1) if not math.isnan(gap)]
    if finite:
        expected.add(-min(finite)[1])
        assert select_checkpoint(root, "best", best).name == f"step-{-min(finite)[1]:08d}"
    assert set(steps(root)) == expected


def test_the_newest_of_equals_is_the_best():
    root = place("memory", None)
    for step in (1, 2, 3):
        write(root, step, metrics={"gap": 0.5})
    assert select_checkpoint(root, "best", LOWEST).name == "step-00000003"


@pytest.mark.parametrize(
    ("verdicts", "kept", "healthy"),
    [([0, 0, 1, 2, 2], [2, 4, 5], 2), ([0, 2, 0], [2, 3], 3), ([2, 2, 2], [2, 3], None), ([None] * 3, [2, 3], None)],
)
def test_the_newest_healthy_one_stays(verdicts, kept, healthy):
    root = place("memory", Path())
    for step, verdict in enumerate(verdicts, 1):
        write(root, step, keep=2, metrics={} if verdict is None else {"monitor/verdict": float(verdict)})
    assert [m.step for m in reversed(manifests(root))] == kept
    if healthy:
        assert select_checkpoint(root, "healthy", None).name == f"step-{healthy:08d}"
    else:
        with pytest.raises(ValueError, match=r"the hack monitor found no checkpoint at .* healthy"):
            select_checkpoint(root, "healthy", None)


def test_a_checkpoint_is_chosen_by_step(root):
    for step, gap in ((10, 0.1), (20, 0.3)):
        write(root, step, metrics={"gap": gap})
    assert select_checkpoint(root, "10", None).name == select_checkpoint(root, "best", LOWEST).name == "step-00000010"
    assert select_checkpoint(root, "best", Best("gap", "max")).name == "step-00000020"
    for which, best, complaint in (
        ("15", None, "holds steps 10, 20"),
        ("newest", None, "expected latest, best, healthy or a step"),
        ("best", None, r"without checkpoint\.best_metric"),
        ("best", Best("other", "min"), "no checkpoint at .* recorded other"),
    ):
        with pytest.raises(ValueError, match=complaint) as refusal:
            select_checkpoint(root, which, best)
        assert "\n" not in str(refusal.value)


def test_only_checkpoints_of_this_run_are_removed(root):
    """Beside ours in the same place: another run's checkpoint and unfinished one, a copy under a name of the user's, a note."""
    theirs = write(root, 10, run="theirs")
    begun = store(root, run="theirs").begin(20)
    for file, text in ((root / "step-00000010-copy" / "note.txt", b"mine"), (begun / "x", b"half")):
        if isinstance(root, Path):
            file.parent.mkdir(exist_ok=True)
        file.write_bytes(text)
    for step in (30, 40):
        write(root, step, keep=1)
    kept = {theirs.name, begun.name, "step-00000010-copy", "step-00000040"}
    assert set(names(root)) == kept
    assert (begun / "x").read_bytes() == b"half"


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("victim", [PART, "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_said_and_kept_aside_or_refused(root, victim, damage, caplog):
    """Never passed over in silence; the one before it is used, whatever was written is still there, and it is not met again."""
    good, bad = write(root, 10), write(root, 20)
    file = bad / victim
    if damage == "flip":
        flip_a_byte(file)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-20])
    else:
        file.unlink()
    if victim == "manifest.json" and damage == "delete" and isinstance(root, RemotePath):
        assert newest_whole(root, "previous") == good, "in a store, no manifest means unfinished"
        return

    def resume(choice):
        while True:
            found = newest_whole(root, choice)
            try:
                load_tensors(found / PART)  # in a store contents are checked when they are fetched
                return found
            except DamagedCheckpoint as error:
                pass_over(root, found, error, choice)

    with pytest.raises(ValueError, match=victim) as caught:
        resume("refuse")
    assert str(caught.value).endswith(f"; restore it, or delete or move {bad} to go back to {good.name}")
    assert "\n" not in str(caught.value)
    assert resume("previous") == good
    assert f"going back to {good.name}. The damaged one is kept as" in caplog.text
    assert victim in caplog.text
    caplog.clear()
    assert resume("refuse") == good
    newer = write(root, 20, keep=1)
    assert resume("refuse") == newer
    assert not caplog.text
    assert sum("step-00000020" in name for name in names(root)) == 2, "the damaged one is still there"


def test_the_only_checkpoint_damaged(tmp_path):
    bad = write(tmp_path, 10)
    (bad / PART).unlink()
    with pytest.raises(
        ValueError, match=rf"{PART} is missing; restore it, or delete or move {bad} to start from step 0"
    ):
        newest_whole(tmp_path, "previous")


def test_retention_never_counts_on_a_directory_without_a_manifest(tmp_path):
    bad = write(tmp_path, 10)
    (bad / "manifest.json").unlink()
    newest = write(tmp_path, 20, keep=1)
    assert verify_checkpoint(newest)
    assert names(tmp_path) == [bad.name, newest.name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"format": 2, "step": 1, "serial": 1, "files": {}}',
        '{"format": 1, "step": 1, "serial": 1, "files": {"a": {}}}',
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


def test_parts_that_the_driver_cannot_see_are_no_checkpoint(root):
    """The worker wrote to another machine's disk: it reports a part that is not here."""
    good, opened = write(root, 10), store(root)
    part = next(iter(manifests(root))).files[PART]
    with pytest.raises(OSError, match=r"does not exist; all machines of a job must see the same storage"):
        opened.commit(opened.begin(20), 20, [part], {}, {})
    assert latest_checkpoint(root) == good


def test_checkpoints_before_retention_knew_metrics_are_read(tmp_path):
    path = write(tmp_path, 10)
    tree = json.loads((path / "manifest.json").read_text())
    del tree["run"], tree["metrics"]
    (path / "manifest.json").write_text(json.dumps(tree))
    assert latest_checkpoint(tmp_path) == path
    write(tmp_path, 20, keep=1)
    assert names(tmp_path) == [path.name, "step-00000020"], "not marked as ours, so it stays"
