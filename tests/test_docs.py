"""The documents stay navigable and true: links and anchors resolve, prose fits a screen, figures of the plan are the plan's."""

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from flashdmd_ray.config import PRESETS, Config, Section, load_config
from flashdmd_ray.plan import gpu_of
from flashdmd_ray.plan.fit import check_fit, processes
from flashdmd_ray.plan.forecast import forecast_of
from flashdmd_ray.plan.mean_step import step_of
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.parts import parts_of_models
from flashdmd_ray.reward_training.config import RewardTrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    if (ROOT / name).is_file()
]
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
WIDTH = 140


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines outside fenced code."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def links(page: Path) -> list[str]:
    text = "\n".join(line for _, line in prose(page))
    return LINK.findall(re.sub(r"`[^`]*`", "code", text))


@cache
def anchors(page: Path) -> frozenset[str]:
    """The names that GitHub gives the headings of a page."""
    headings = [line.lstrip("#").strip() for _, line in prose(page) if re.match(r"#{1,6} ", line)]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).lower() for heading in headings]
    return frozenset(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page):
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_of_prose_is_too_long(page):
    """Rows of tables may be. CARD.md is written by the recipes."""
    if page.name == "CARD.md":
        return
    assert [n for n, line in prose(page) if len(line) > WIDTH and not line.lstrip().startswith("|")] == []


@pytest.mark.parametrize("index", [ROOT / "README.md", ROOT / "docs" / "README.md"], ids=["README", "index"])
def test_every_page_is_linked_from(index):
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)} | {index}
    pages = {page for page in PAGES if page.parent == ROOT / "docs"} - {ROOT / "docs" / "README.md"}
    assert pages - linked == set()


def rows(page: Path) -> dict[str, list[str]]:
    """Preset -> the cells of the table row that begins with it; a row may begin with several."""
    found = {}
    for _, line in prose(page):
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for name in re.findall(r"`(\w+)`", cells[0]) if line.startswith("| `") else ():
            found[name] = cells
    return found


def presets(page: Path) -> set[str]:
    return rows(page).keys() & PRESETS.keys()


def test_every_preset_is_described():
    described = rows(ROOT / "docs/planning.md") | rows(ROOT / "docs/latent_rewards.md")
    assert described.keys() >= PRESETS.keys()
    assert presets(ROOT / "README.md") == presets(ROOT / "docs/planning.md")


@pytest.mark.parametrize("preset", sorted(presets(ROOT / "docs/planning.md")))
def test_the_figures_of_the_presets_are_what_the_plan_says(preset, monkeypatch):
    assert len(PRESETS[preset].read_text(encoding="utf-8").splitlines()) <= 80
    monkeypatch.setattr("flashdmd_ray.plan.measure.measure", None)  # the networks of presets are in the table
    page, readme = rows(ROOT / "docs/planning.md")[preset], rows(ROOT / "README.md")[preset]
    if preset.startswith("demo"):
        assert not "".join(page[3:]).strip("| ")
        return
    config = load_config(preset)
    models, gpu = models_of(config), gpu_of(config, None)
    step = step_of(config, models, gpu)
    parts = parts_of_models(config, models)
    check_fit(config, models, parts, step)
    planned = processes(config, parts, step)
    sizes = {group: f"{process.gpu_gib:.0f}" for group, process in planned.items() if process is not None}
    local = [sizes["local"]] if "local" in sizes else [f"{group} {size}" for group, size in sizes.items()]
    assert page[3] == ", ".join(local)
    forecast = forecast_of(config, step, gpu)
    figures = [float(f"{value:.2g}") for value in (forecast.seconds, forecast.before)]
    assert [float(value) for value in re.findall(r"([\d.]+) s a step.*?\(([\d.]+) s before", page[4])[0]] == figures
    hours = f"{forecast.hours:.2g}" if forecast.hours < 100 else f"{forecast.hours:.0f}"
    assert f"{hours} GPU-hours" in page[4]
    assert f"planned: {max(sizes.values())} GiB, " in readme[3]
    assert f"{hours} GPU-hours" in readme[3]
    assert f"about ${forecast.cost:,.0f}" in readme[3]


def test_the_results_of_the_readme_are_those_of_the_results_page():
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Results in short")[1].split("\n## ")[0]
    triples = re.findall(r"[.\d]+ / [.\d]+ / [.\d]+", table)
    assert len(triples) >= 10
    assert [triple for triple in triples if triple not in results] == []


def test_every_page_that_code_names_exists():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in tracked if name.endswith((".py", ".yaml", ".yml", "Makefile", "Dockerfile"))]
    named = {page for file in files if file.is_file() for page in re.findall(r"docs/\w+\.md", file.read_text("utf-8"))}
    assert "docs/trials.md" in named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def settings(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, f"{prefix}{name}.")


def test_every_setting_that_a_page_names_exists():
    known = {*settings(Config), *settings(RewardTrainingConfig)}
    sections = {name.split(".")[0] for name in known if "." in name}
    named = {
        (page.name, name)
        for page in PAGES
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:[:=][^`]*)?`", page.read_text(encoding="utf-8"))
        if name.split(".")[0] in sections and not name.endswith((".py", ".md", ".json", ".yaml"))
    }
    assert len(named) > 100
    assert sorted((page, name) for page, name in named if name not in known and page != "CHANGELOG.md") == []
