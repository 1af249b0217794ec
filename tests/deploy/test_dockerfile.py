"""deploy/Dockerfile: accepted by hadolint, pinned, without root and without secrets, and made of the locked versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy/Dockerfile").read_text()
LOCK = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_hadolint_has_no_complaint() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "deploy/Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_and_can_be_pinned_by_digest() -> None:
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11\.\d+-slim-\w+$", TEXT, re.MULTILINE)
    bases, stages = zip(*re.findall(r"^FROM (\S+) AS (\S+)$", TEXT, re.MULTILINE), strict=True)
    assert set(bases) - set(stages) == {"${PYTHON_IMAGE}"}
    assert {"cpu", "cuda"} <= set(stages)
    assert "PYTHON_IMAGE=" in (ROOT / "deploy/README.md").read_text()


def test_versions_are_the_locked_ones() -> None:
    assert f"ARG RAY_VERSION={LOCK['ray']}\n" in TEXT
    assert TEXT.count("assert ray.__version__ == '${RAY_VERSION}'") == 2
    assert "UV_CONSTRAINT=/build/constraints.txt UV_BUILD_CONSTRAINT=/build/constraints.txt" in TEXT
    assert re.findall(r"(?<!uv )pip install .*", TEXT) == [
        "pip install --no-cache-dir --constraint constraints.txt uv \\"
    ]


def test_no_secret_is_built_in() -> None:
    assert not re.search(r"(?i)(token|password|secret|api_key)\w*\s*=", TEXT)
    assert not re.search(r"(?m)^(ADD|EXPOSE|VOLUME)\b", TEXT)


def test_the_context_holds_exactly_what_is_copied() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copies = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE)]
    assert {word for words in copies for word in words} == set(allowed)
    tracked = subprocess.run(["git", "ls-files", *allowed], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {Path(name).parts[0] for name in tracked.stdout.split()} == set(allowed)
