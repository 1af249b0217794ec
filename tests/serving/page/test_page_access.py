"""The page at `/` in a real browser: errors, keys, keyboard, phones, colours, and what the browser may load."""

from __future__ import annotations

import re
import urllib.request

import pytest
from playwright.sync_api import Browser, expect
from visiting import KEY, PROMPT, SECONDS, draw, serving, visit

from flashdmd_ray.serving.replica import GeneratorReplica

pytestmark = pytest.mark.browser


def test_the_keyboard_reaches_everything_in_reading_order(browser: Browser, site: str) -> None:
    with visit(browser, site) as page:
        expect(page.locator("#prompt")).to_be_focused()
        page.keyboard.type(" ")
        reached = []
        for _ in range(16):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id || document.activeElement.name || 'example'"))
        seen = [name for name in reached if name != "example"]
        wanted = [
            "model",
            "steps",
            "n-less",
            "n",
            "n-more",
            "size",
            "seed",
            "shuffle",
            "lock",
            "with-teacher",
            "generate",
        ]
        assert seen[: len(wanted)] == wanted
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        expect(page.locator("#status")).to_have_text(re.compile(rf"in {SECONDS}"))
        for field in page.locator("input:visible, select:visible, textarea:visible, button:visible").all():
            name = field.evaluate(
                "e => e.getAttribute('aria-label') || [...(e.labels ?? [])].map(l => l.innerText).join() || e.innerText"
            )
            assert name.strip(), field.evaluate("e => e.outerHTML")


def test_refusals_name_the_field_and_take_the_keyboard_there(browser: Browser, generator: GeneratorReplica) -> None:
    with serving(generator, images=3, prompt_characters=60) as site, visit(browser, site) as page:
        page.fill("#prompt", " ")
        page.click("#generate")
        expect(page.locator("#alert")).to_have_text("Write what to draw, or choose an example.")
        expect(page.locator("#prompt")).to_be_focused()
        page.fill("#prompt", "a red 4 " * 10)
        page.click("#generate")
        expect(page.locator("#alert")).to_contain_text("at most 60")
        expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
        page.fill("#prompt", PROMPT)
        page.fill("#n", "9")
        page.click("#generate")
        expect(page.locator("#alert")).to_contain_text("at most 3 images")
        expect(page.locator("#n")).to_be_focused()
        expect(page.locator("#empty")).to_be_visible()
        page.fill("#n", "3")
        draw(page)
        expect(page.locator("#alert")).to_be_hidden()
        expect(page.locator("[aria-invalid]")).to_have_count(0)


def test_a_rate_limit_is_counted_down(browser: Browser, generator: GeneratorReplica) -> None:
    with serving(generator, images_per_minute=30, burst=1) as site, visit(browser, site) as page:
        page.fill("#n", "1")
        draw(page)
        page.click("#generate")
        expect(page.locator("#alert")).to_contain_text("Too many requests.")
        expect(page.locator(".countdown")).to_have_text(re.compile(r"[12] s"))
        expect(page.locator("#generate")).to_be_disabled()
        expect(page.locator(".student img")).to_have_count(1)
        expect(page.locator("#status")).to_have_text("You can draw again.")
        expect(page.locator("#alert")).to_be_hidden()
        draw(page)


def test_a_key_is_asked_for_and_kept_in_this_tab_only(browser: Browser, generator: GeneratorReplica) -> None:
    with serving(generator, keys=(KEY,)) as site, visit(browser, site, ready=False) as page:
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#generate")).to_be_disabled()
        page.keyboard.type("wrong-key-of-the-tests")
        page.keyboard.press("Enter")
        expect(page.locator("#alert")).to_have_text("This key is not known here.")
        page.fill("#key", KEY)
        page.click("#key-use")
        expect(page.locator("#key-field")).to_be_hidden()
        draw(page)
        assert page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href").find(KEY) == -1
        page.reload()
        draw(page)
        other = page.context.new_page()
        other.goto(site)
        expect(other.locator("#key-field")).to_be_visible()


def test_a_server_that_is_gone_is_said_and_found_again(browser: Browser, generator: GeneratorReplica) -> None:
    with serving(generator) as site, visit(browser, site) as page:
        page.route("**/v1/images/generations", lambda route: route.abort())
        page.click("#generate")
        expect(page.locator("#alert")).to_contain_text("The server cannot be reached.")
        page.unroute("**/v1/images/generations")
        draw(page)


@pytest.mark.parametrize("width", [320, 390])
def test_usable_on_a_phone(browser: Browser, site: str, width: int) -> None:
    phone = {
        "viewport": {"width": width, "height": 740},
        "has_touch": True,
        "is_mobile": True,
        "device_scale_factor": 2,
    }
    with visit(browser, site, **phone) as page:
        page.tap(".switch")
        expect(page.locator("#with-teacher")).to_be_checked()
        page.tap("#generate")
        expect(page.locator(".ratio")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        expect(page.locator(".student img").first).to_be_in_viewport()
        tops = page.evaluate(
            "['student', 'teacher'].map(s => document.querySelector(`.${s} img`).getBoundingClientRect().top)"
        )
        assert tops[0] == tops[1], "beside each other"
        for touched in page.locator("#form button:visible:not(.examples button), #form select, #form textarea").all():
            box = touched.bounding_box()
            assert box is not None
            assert box["height"] >= 40, touched.evaluate("e => e.outerHTML")


CONTRAST = """
selector => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(v => v / 255).map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let element = document.querySelector(selector);
  const ink = parse(getComputedStyle(element).color).slice(0, 3);
  let paper = parse(getComputedStyle(element).backgroundColor);
  while (paper.length === 4 && paper[3] < 1) {
    element = element.parentElement;
    paper = parse(getComputedStyle(element).backgroundColor);
  }
  const [low, high] = [luminance(ink), luminance(paper.slice(0, 3))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_can_be_read(browser: Browser, site: str, scheme: str) -> None:
    with visit(browser, site, color_scheme=scheme) as page:
        draw(page)
        page.click("text=Compare with the teacher")
        expect(page.locator(".ratio")).to_be_visible()
        background = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(background)
        assert (sum(map(int, re.findall(r"\d+", before)[:3])) < 384) == (scheme == "dark")
        texts = [
            ".shown-prompt",
            ".student h3",
            ".teacher h3",
            ".time small",
            ".help",
            "figcaption",
            "#generate",
            "#status",
        ]
        poor = {text: ratio for text in texts if (ratio := page.evaluate(CONTRAST, text)) < 4.5}
        assert poor == {}, "contrast of text, WCAG AA"
        page.click("#theme")
        page.reload()
        after = page.evaluate(background)
        assert after != before, "the choice outlives the visit"


def test_the_policy_lets_the_browser_load_nothing_from_elsewhere(site: str) -> None:
    for path in ("", "page/app.js", "page/style.css"):
        with urllib.request.urlopen(site + path, timeout=10) as response:
            policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
            text = response.read().decode()
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
        addresses = set(re.findall(r"https?://[^\s\"'`)<]+", text)) - {"http://www.w3.org/2000/svg"}
        assert addresses == set()
