"""Settings of all tests (before torch or Ray are imported), and the one local Ray they share."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

SETTINGS = {
    "OMP_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by the processes that tests start

from flashdmd_ray.runtime.environment import use_loopback, use_quick_handles  # noqa: E402 (after the settings)

use_loopback(os.environ)
use_quick_handles(os.environ)
gc.disable()  # until all test files are imported: collections take a fifth of that time


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out tests marked with something that is not here (deselected, so that the summary counts them), and sort the files.

    A file with few tests has long ones, mostly; they come first, so that at the end no process waits minutes for the last file of another.
    """
    # Those with the fixture `launches` do not count: a file has many, and they only look at what its one start of ranks has found.
    tests = Counter(item.path for item in items if "launches" not in item.fixturenames)
    items.sort(key=lambda item: (tests[item.path], item.path))
    for mark, is_there in (("gpu", has_gpu), ("browser", has_browser), ("prometheus", has_prometheus)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not is_there():
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has_browser() -> bool:
    return chromium() is not None


def has_prometheus() -> bool:
    return shutil.which("prometheus") is not None


def chromium() -> str | None:
    """Path of an installed Chromium; playwright's own download is not used."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private Ray on the loopback address, for all tests of this process; a runtime built meanwhile uses it and leaves it running."""
    from flashdmd_ray.runtime.cluster import Cluster

    cluster = Cluster.join()
    yield
    cluster.leave()
