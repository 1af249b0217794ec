"""Settings of all tests (before torch or Ray are imported), and the one local Ray they share."""

from __future__ import annotations

import os
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

from flashdmd_ray.runtime.environment import use_loopback  # noqa: E402 (after the settings)

use_loopback(os.environ)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `gpu` where there is no CUDA device: deselected, so that the summary counts them."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A private Ray on the loopback address, for all tests of this process; a runtime built meanwhile uses it and leaves it running."""
    from flashdmd_ray.runtime.cluster import Cluster

    cluster = Cluster.join()
    yield
    cluster.leave()
