"""One generator, one site and one browser for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from visiting import FLAGS, serving

from flashdmd_ray.serving.replica import GeneratorReplica
from flashdmd_ray.serving.settings import parse_settings
from tests.conftest import chromium
from tests.serving.exports import export_demo


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> GeneratorReplica:
    export = export_demo(tmp_path_factory.mktemp("served") / "demo")
    cache = str(export.parent / "cache")
    return GeneratorReplica(parse_settings({"models": {"demo": str(export)}, "cache": cache, "replica": {"batch": 4}}))


@pytest.fixture(scope="module")
def site(generator: GeneratorReplica) -> Iterator[str]:
    with serving(generator) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()
