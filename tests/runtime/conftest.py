"""One private Ray for all tests of the runtime: starting it takes several seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashdmd_ray.runtime.environment import use_loopback

use_loopback(os.environ)
HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])  # workers import the toy roles too


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray is running; runtimes built meanwhile use it and leave it running."""
    from flashdmd_ray.runtime.cluster import Cluster

    cluster = Cluster.join()
    yield
    cluster.leave()
