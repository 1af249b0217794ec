"""Requests made from the OpenAPI document: every answer is one that it names, and no valid request is refused."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.results.export import export_pipeline
from flashdmd_ray.run.http_server import listen_on, running_server
from flashdmd_ray.serving.api import build_api
from flashdmd_ray.serving.replica import GeneratorReplica
from flashdmd_ray.serving.settings import parse_settings
from tests.serving.exports import FACTS
from tests.tiny import save_sdxl

KEY = "a-key-that-is-long-enough"
EXAMPLES = 40


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The API over a tiny model, in a thread."""
    root = tmp_path_factory.mktemp("fuzzed")
    family = SDXL.from_pretrained(str(save_sdxl(root / "base")))
    export = export_pipeline(family, family.teacher.state_dict(), (999, 499), root / "export", FACTS)
    tree = {
        "models": {"tiny": str(export)},
        "aliases": {"other": "tiny"},
        "bases": {FACTS.base: str(root / "base")},
        "teacher_steps": 2,
        "cache": str(root / "cache"),
    }
    settings = parse_settings(tree)
    api = build_api(settings, GeneratorReplica(settings), (KEY,))
    with listen_on("127.0.0.1", 0) as listener, running_server(api, listener, threading.Event(), drain_s=20):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_the_document_is_true(url, tmp_path):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--phases", "fuzzing", "--max-examples", str(EXAMPLES)]
    command += ["--seed", "1", "--continue-on-failure", "--no-color", "--suppress-health-check", "all"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout, done.stdout[-3000:]
