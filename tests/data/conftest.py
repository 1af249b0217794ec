"""Data sets that the tests share, and their helper module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import scenes_on_disk

COUNT = 24


@pytest.fixture(scope="session")
def captioned() -> list[tuple[str, bytes]]:
    return scenes_on_disk.samples(COUNT)


@pytest.fixture(scope="session")
def written(tmp_path_factory, captioned) -> dict[str, Path]:
    """The same samples in the same order, by format."""
    root = tmp_path_factory.mktemp("written")
    return {
        "folder": scenes_on_disk.write_folder(root / "folder", captioned),
        "tar": scenes_on_disk.write_tars(root / "tar", captioned, each=7),
        "parquet": scenes_on_disk.write_parquet(root / "parquet", captioned, group=5),
    }


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"
