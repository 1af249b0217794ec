"""The page at `/` in a real browser: drawing, comparing, remembering."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect
from visiting import KEY, PROMPT, SECONDS, api, draw, serving, settings_of, shown_image, visit

from flashdmd_ray.serving.replica import GeneratorReplica

pytestmark = pytest.mark.browser


def test_draws_what_the_api_draws_and_says_how_long_it_took(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        assert page.locator("#steps span").all_inner_texts() == ["1", "2", "4"], "those that the demo offers"
        page.fill("#n", "2")
        page.check("#steps input[value='2']", force=True)
        draw(page)
        expect(page.locator(".student img")).to_have_count(2)
        expect(page.locator(".student .time strong")).to_have_text(re.compile(SECONDS))
        seed = int(page.input_value("#seed"))
        answer = api(site, prompt=PROMPT, n=2, seed=seed, num_inference_steps=2)
        assert shown_image(page) == base64.b64decode(answer["data"][0]["b64_json"])


def test_small_images_are_enlarged_without_blur(browser: Browser, site: str) -> None:
    """The middle of each source pixel has its colour on the screen."""
    with visit(browser, site) as page:
        page.fill("#n", "1")
        draw(page)
        page.wait_for_timeout(400)  # the picture fades in
        source = np.asarray(Image.open(io.BytesIO(shown_image(page))).convert("RGB"), dtype=int)
        seen = np.asarray(Image.open(io.BytesIO(page.locator(".student img").screenshot())).convert("RGB"), dtype=int)
    scale = seen.shape[0] / source.shape[0]
    assert scale > 8
    middles = ((np.arange(source.shape[0]) + 0.5) * scale).astype(int)
    inner = slice(1, -1)  # the corners are rounded
    difference = np.abs(seen[np.ix_(middles, middles)] - source)[inner, inner]
    assert difference.max() <= 2


def test_seeds_change_until_locked(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        page.fill("#n", "1")
        draw(page)
        first, image = page.input_value("#seed"), shown_image(page)
        page.click("#lock")
        expect(page.locator("#lock")).to_have_attribute("aria-pressed", "true")
        draw(page)
        assert (page.input_value("#seed"), shown_image(page)) == (first, image)
        page.click("#shuffle")
        assert page.input_value("#seed") != first
        page.click("#lock")
        shuffled = page.input_value("#seed")
        draw(page)
        assert page.input_value("#seed") != shuffled


def test_the_teacher_beside_the_student(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        page.fill("#n", "1")
        draw(page)
        page.click("text=Compare with the teacher")
        expect(page.locator(".ratio")).to_be_visible()
        assert page.locator(".teacher h3").inner_text().endswith("25 steps, 50 forwards")
        times = [float(text.split()[0]) for text in page.locator(".time strong").all_inner_texts()]
        factor = float(re.match(r"([\d.]+)×", page.locator(".ratio strong").inner_text())[1])  # type: ignore[index]
        ratio = max(times) / min(times)
        assert factor == pytest.approx(ratio, rel=0.1), "the ratio is that of the seconds shown"
        seed = int(page.input_value("#seed"))
        answer = api(site, model="demo:teacher", prompt=PROMPT, seed=seed)
        assert shown_image(page, ".teacher img") == base64.b64decode(answer["data"][0]["b64_json"])
        page.check("#with-teacher", force=True)
        page.click("#generate")
        expect(page.locator("#history li")).to_have_count(2)
        expect(page.locator(".ratio")).to_be_visible()


def test_the_history_restores_settings_and_images(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        page.fill("#n", "2")
        page.check("#steps input[value='1']", force=True)
        draw(page)
        first, image = settings_of(page), shown_image(page)
        page.click("#n-less")
        page.check("#steps input[value='4']", force=True)
        draw(page, "a cyan 6 on a black background")
        assert settings_of(page) != first
        page.locator("#history button").last.click()
        assert (settings_of(page), shown_image(page)) == (first, image)
        expect(page.locator(".shown-prompt")).to_have_text(PROMPT)
        page.click("#clear")
        expect(page.locator("#history-section")).to_be_hidden()


@pytest.mark.parametrize("keys", [(), (KEY,)], ids=["open", "with a key"])
def test_the_code_it_shows_draws_the_same_image(
    browser: Browser, generator: GeneratorReplica, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    prompt = "a red 4 on a 'gray' background \"quoted\" $HOME \\ `x` \U0001f600"
    with serving(generator, keys) as site, visit(browser, site, ready=not keys) as page:
        if keys:
            page.fill("#key", KEY)
            page.press("#key", "Enter")
        page.fill("#n", "1")
        draw(page, prompt)
        page.click("text=Copy as code")
        python = page.locator("#code-text").inner_text()
        page.check("dialog input[value=curl]", force=True)
        curl = page.locator("#code-text").inner_text()
        assert KEY not in python + curl
        environment = {**os.environ, "FLASHDMD_API_KEY": KEY}
        run: dict[str, Any] = {"cwd": tmp_path, "env": environment, "check": True, "timeout": 60}
        subprocess.run([sys.executable, "-c", python], **run)
        assert (tmp_path / "image-0.png").read_bytes() == shown_image(page)
        answer = subprocess.run(["bash", "-c", curl], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **run)
        assert base64.b64decode(json.loads(answer.stdout)["data"][0]["b64_json"]) == shown_image(page)
        page.click("#copy")
        expect(page.locator("#copied")).to_have_text(re.compile("Copied|Selected"))


def test_escape_cancels_and_the_next_drawing_works(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        page.fill("#n", "10")
        page.select_option("#model", "demo:teacher")
        page.keyboard.press("Control+Enter")
        expect(page.locator(".waiting")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#empty")).to_be_visible()
        page.select_option("#model", "demo")
        page.fill("#n", "1")
        draw(page)


def test_a_prompt_is_text_and_never_markup(browser: Browser, site: str) -> None:
    prompt = "<img src=x onerror='document.title=1'><b>a red 4</b>"
    with visit(browser, site) as page:
        page.fill("#n", "1")
        draw(page, prompt)
        expect(page.locator(".shown-prompt")).to_have_text(prompt)
        assert "flashdmd" in page.title()
