"""The outcomes of the checks that run on several ranks."""

from __future__ import annotations

import pytest

from tests.engine.ranks import Launches


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Launch the `CHECKS` of the test module, once for each number of ranks."""
    return Launches(f"tests.engine.{request.path.stem}", request.module.CHECKS, tmp_path_factory.mktemp("ranks"))
