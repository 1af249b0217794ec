"""deploy/Dockerfile: pinned, small, without root and without secrets, and made of the locked versions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from dockerfile import parse

ROOT = Path(__file__).parents[2]
FILE = parse(ROOT / "deploy/Dockerfile")
LOCK = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
TARGETS = ("cpu", "cuda")


def test_the_base_is_pinned_and_can_be_pinned_by_digest() -> None:
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", FILE.arguments["PYTHON_IMAGE"])
    external = {stage.base for stage in FILE.stages.values()} - set(FILE.stages)
    assert external == {"${PYTHON_IMAGE}"}
    assert "PYTHON_IMAGE=" in (ROOT / "deploy/README.md").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_ends_as_a_user_without_rights(target: str) -> None:
    assert FILE.all(target, "USER") == ["10001"]
    assert "useradd --uid 10001" in FILE.stages["base"].all("RUN")[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_ray_of_the_image_is_the_locked_one(target: str) -> None:
    assert FILE.all(target, "ARG") == [f"RAY_VERSION={LOCK['ray']}"]
    assert any("assert ray.__version__ == '${RAY_VERSION}'" in text for text in FILE.stages[target].all("RUN"))


def test_what_is_installed_is_locked_and_installed_by_uv() -> None:
    environment = FILE.environment("dependencies")
    assert environment["UV_CONSTRAINT"] == environment["UV_BUILD_CONSTRAINT"] == "/build/constraints.txt"
    runs = [text for stage in FILE.stages.values() for text in stage.all("RUN")]
    assert [text for text in runs if re.search(r"\bpip install\b", text) and "uv pip install" not in text] == [
        "python -m pip install --no-cache-dir --constraint constraints.txt uv && python -m uv venv /opt/venv"
    ]
    for target in TARGETS:
        (install,) = FILE.stages[f"dependencies-{target}"].all("RUN")
        assert "--requirements pyproject.toml" in install
        assert ("--torch-backend cpu" in install) == (target == "cpu")


def test_system_packages_leave_no_lists_behind() -> None:
    for text in (text for stage in FILE.stages.values() for text in stage.all("RUN")):
        if "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text


def test_code_is_copied_after_the_dependencies() -> None:
    """A change of code must not build the gigabytes below it anew."""
    for target in TARGETS:
        sources = FILE.stages[target].all("COPY")
        assert sources[0] == f"--from=dependencies-{target} /opt/venv /opt/venv"
    assert FILE.stages["dependencies"].all("COPY") == ["constraints.txt pyproject.toml ./"]


def test_no_secret_is_built_in() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    assert not re.search(r"(?i)(token|password|secret|api_key)\w*\s*=", text)
    assert not re.search(r"(?m)^(ADD|EXPOSE|VOLUME)\b", text)


def copied_from_the_context() -> list[str]:
    copies = [text.split() for stage in FILE.stages.values() for text in stage.all("COPY")]
    return [word for words in copies if not words[0].startswith("--from=") for word in words[:-1]]


def test_the_context_holds_exactly_what_is_copied() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(copied_from_the_context()) == set(allowed)
    tracked = subprocess.run(["git", "ls-files", *allowed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {Path(name).parts[0] for name in tracked.stdout.split()} == set(allowed)
