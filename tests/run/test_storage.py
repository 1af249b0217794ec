"""Which places are understood, and that what cannot be used is refused in one line before a run starts."""

import importlib.util
import os

import pytest

from flashdmd_ray.config import parse_config
from flashdmd_ray.plan import check, describe
from flashdmd_ray.run.storage import RemotePath, checkpoint_root, children, parse_location
from tests.checkpoint.writing import write

DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "oci": "ocifs", "oss": "ossfs"}


def config(folder, where, runtime="local"):
    return parse_config({"run": {"dir": str(folder), "name": "here"}, "checkpoint": {"dir": where}, "runtime": runtime})


def test_without_a_place_checkpoints_lie_in_the_run_folder(tmp_path):
    assert checkpoint_root(config(tmp_path, None), tmp_path / "here") == tmp_path / "here" / "checkpoints"


def test_a_place_gets_a_folder_of_the_run_s_name(tmp_path):
    for where in (str(tmp_path / "disk"), f"file://{tmp_path}/disk", f"local://{tmp_path}/disk"):
        assert checkpoint_root(config(tmp_path, where), tmp_path) == tmp_path / "disk" / "here"
    assert checkpoint_root(config(tmp_path, "memory://store/"), tmp_path) == RemotePath("memory://store/here")


@pytest.mark.parametrize("protocol", DRIVERS)
def test_a_missing_driver_is_named(protocol):
    package = DRIVERS[protocol]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=rf"the driver of {protocol}:// is not installed .*; pip install {package}$"):
        parse_location(f"{protocol}://bucket/folder")


def test_places_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for where, runtime, complaint in (
        ("s33://bucket", "local", "fsspec knows no protocol 's33', did you mean 's3'"),
        ("simplecache::memory://x", "local", "chained URLs cannot tell when a file has arrived"),
        ("memory://store", "ray", "memory:// is seen by one process only"),
        (str(tmp_path / "file" / "below"), "local", "cannot write .*below/here"),
        ("http://127.0.0.1:1/x", "local", "cannot write http://127.0.0.1:1/x/here"),
    ):
        with pytest.raises(ValueError, match=complaint) as refusal:
            check(config(tmp_path, where, runtime))
        assert str(refusal.value).startswith("checkpoint.dir: ")
        assert "\n" not in str(refusal.value)


def test_trying_a_place_leaves_nothing_and_the_plan_says_what_is_there(tmp_path):
    settings = config(tmp_path, f"memory://{os.getpid()}-plan")
    run, parts = check(settings)
    root = checkpoint_root(settings, run.path)
    assert children(root) == []
    assert "(new)" in describe(settings, run, parts)
    write(root, 10)
    assert "(resumes from its newest checkpoint)" in describe(settings, run, parts)


def test_a_remote_path_is_like_a_path(tmp_path):
    root = RemotePath(f"file://{tmp_path}/a")
    file = root / "b" / "c.txt"
    assert not root.exists()
    file.write_bytes(b"text")
    assert (file.name, file.parent, str(file)) == ("c.txt", root / "b", f"file://{tmp_path}/a/b/c.txt")
    assert (file.read_bytes(), file.read_text(), file.size()) == (b"text", "text", 4)
    assert children(root) == [root / "b"]
    for _ in range(2):
        file.unlink()
        root.remove()
    assert children(root) == []
