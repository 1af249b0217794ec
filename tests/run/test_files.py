"""Files and folders appear whole or not at all, whatever ends the writer."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdmd_ray.run.files import check_writable, new_file, new_folder, user_cache, write_atomically


def _fail(make: Callable[[Path], AbstractContextManager[Path]], path: Path) -> None:
    with make(path) as unfinished:
        (unfinished / "half").touch() if unfinished.is_dir() else unfinished.write_text("half")
        raise KeyboardInterrupt


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    for make, name in ((new_file, "file"), (new_folder, "folder")):
        with pytest.raises(KeyboardInterrupt):
            _fail(make, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "old"]
    assert (tmp_path / "file").read_text() == "old"


def test_new_content_replaces_the_old_one_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    write_atomically(tmp_path / "file", b"new")
    for name in ("old", "new"):
        with new_folder(tmp_path / "deep" / "folder") as unfinished:
            (unfinished / name).touch()
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "file", "folder", "new"]


def test_two_writers_at_once_leave_one_of_their_files_whole(tmp_path: Path) -> None:
    with new_file(tmp_path / "file") as first, new_file(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "first"  # the block that ended last


def test_the_umask_decides_who_may_read_a_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "weights") as unfinished:
            save_file({"a": torch.zeros(1)}, unfinished)  # which makes files that only their owner can read
        with new_folder(tmp_path / "folder") as unfinished:
            save_file({"a": torch.zeros(1)}, unfinished / "weights")
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "weights").stat().st_mode & 0o777 == 0o640


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error:  # noqa: PT011 (the file it names is what counts)
        check_writable(tmp_path / "file" / "deep")
    assert error.value.filename == str(tmp_path / "file")
    check_writable(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache("data") == Path("/cache/flashdmd_ray/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/me")
    assert user_cache("data") == Path("/users/me/.cache/flashdmd_ray/data")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # as of a container that runs under any number
    with pytest.raises(ValueError, match=r"no folder to cache data: .*set XDG_CACHE_HOME"):
        user_cache("data")
