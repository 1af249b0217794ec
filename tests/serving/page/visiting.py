"""A visitor of the page: a fresh browser context over the real API and a generator that really draws, in this process."""

from __future__ import annotations

import base64
import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect

from flashdmd_ray.run.http_server import listen_on, running_server
from flashdmd_ray.serving.api import build_api
from flashdmd_ray.serving.replica import GeneratorReplica
from flashdmd_ray.serving.settings import parse_settings

PROMPT = "a red 4 left of a green 7 on a gray background"
SECONDS = r"\d+\.\d+ s"
KEY = "a-key-of-the-tests-0123456789"
PATIENCE_MS = 60_000.0
"""For whatever a test waits for: the browser shares the cores with other tests."""
expect.set_options(timeout=PATIENCE_MS)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def serving(generator: GeneratorReplica, keys: tuple[str, ...] = (), **limits: Any) -> Iterator[str]:
    """The API and the page on a free port of the loopback address; yields the page's address."""
    settings = parse_settings({"models": {"demo": "not read again"}, "limits": limits})
    api = build_api(settings, generator, keys)
    with listen_on("127.0.0.1", 0) as listener, running_server(api, listener, threading.Event(), drain_s=30):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@contextmanager
def visit(browser: Browser, address: str, ready: bool = True, **context: Any) -> Iterator[Page]:
    """A fresh visitor. Whatever it asks of another host fails the test, as does a script error or a violation of the policy."""
    visitor = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    page = visitor.new_page()
    page.set_default_timeout(PATIENCE_MS)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    if ready:
        expect(page.locator("#steps input")).not_to_have_count(0)
    try:
        yield page
    finally:
        visitor.close()
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    # The browser itself notes every answer that is no success.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def draw(page: Page, prompt: str = PROMPT) -> None:
    page.fill("#prompt", prompt)
    page.click("#generate")
    expect(page.locator("#status")).to_have_text(re.compile(rf"^\d+ images? in {SECONDS}\.$"))


def shown_image(page: Page, selector: str = ".student img") -> bytes:
    source = page.locator(selector).first.get_attribute("src")
    assert source is not None
    return base64.b64decode(source.removeprefix("data:image/png;base64,"))


def api(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def settings_of(page: Page) -> dict[str, Any]:
    names = ("prompt", "n", "seed", "size", "model")
    return {name: page.input_value(f"#{name}") for name in names} | {
        "steps": page.locator("#steps input:checked").input_value()
    }
