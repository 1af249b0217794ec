"""The stack of docker-compose.yml runs, trains and serves: its services as processes on the loopback address, with the commands of
docs/deployment.md and the package installed from a wheel. The one head that the suite starts as an operator would."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compose_file import ROOT
from PIL import Image
from stack import Stack, finish, free_ports
from watching import Prometheus, expressions

from flashdmd_ray.run.metrics_log import read_metrics

DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()


def documented(start: str) -> list[str]:
    """The command of docs/deployment.md that begins with `start`, without it."""
    (line,) = re.findall(rf"^{re.escape(start)} (.*)$", DEPLOYMENT, re.MULTILINE)
    return shlex.split(line, comments=True)


TRAIN = documented("docker compose exec ray-head")
SHORT = [
    "batch=2",
    "preference.updates=1",
    "preference.batch=2",
    "preference.candidates=2",
    "evaluation.samples=2",
    "evaluation.batch=2",
    "evaluation.student_steps=[4]",
    "evaluation.teacher_steps=2",
    "placement.discriminator.within=learner",
    "placement.rollout.within=learner",
]
"""The demo with as little to do, and as few processes, as it can have."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """`docker compose up`: the services without a profile, each once those it depends on are healthy."""
    stack = Stack.create()
    try:
        for name in ("ray-head", "mlflow"):
            stack.start(name)
        stack.start("ray-worker")
        stack.wait_until_healthy(stack.running)
        yield stack
        ended = stack.stop()
        assert None not in ended.values(), ended
        assert [process.cmdline() for process in stack.left_behind()] == []
    finally:
        stack.remove()


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Iterator[Prometheus | None]:
    """A Prometheus that scrapes the stack, where one is installed; only tests marked so look at it."""
    if shutil.which("prometheus") is None:
        yield None
        return
    key = stack.directory / "secrets" / "api_keys"
    port, ray, serve = free_ports(1)[0], stack.port("ray-head", 8080), stack.port("serve", 8000)
    one = Prometheus(stack.directory / "prometheus", port, ray, serve, key)
    yield one
    one.close()


@pytest.fixture(scope="module")
def first(stack: Stack, prometheus: Prometheus | None) -> subprocess.Popen[str]:
    """The documented command; while its roles load, other tests look around."""
    assert TRAIN[:3] == ["ray", "job", "submit"]
    return stack.begin("ray-head", [*TRAIN[:3], "--submission-id=first", *TRAIN[3:], *SHORT, "steps=1000"])


def wait_for(is_so: Callable[[], object], limit: float) -> None:
    give_up = time.monotonic() + limit
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.2)


def call(url: str, key: str | None = None, body: object = None) -> tuple[int, bytes]:
    """HTTP status and body."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, headers=headers, data=None if body is None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_job_api_wants_the_token(stack: Stack, first: subprocess.Popen[str]) -> None:
    jobs = f"http://127.0.0.1:{stack.port('ray-head', 8265)}/api/jobs/"
    assert call(jobs)[0] == 401
    assert call(jobs, "0" * 64)[0] in (401, 403)
    assert call(jobs, stack.secret("ray_auth_token"))[0] == 200


def test_a_script_runs_with_this_interpreter_and_without_what_git_ignores(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import os, sys, flashdmd_ray\nprint('files', sorted(os.listdir('.')), sys.executable)\nsys.exit(3)\n"
    )
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for ignored in ("data", "runs", "work", ".venv", "deploy/secrets"):
        (tmp_path / ignored).mkdir(parents=True)
        (tmp_path / ignored / "large.bin").write_bytes(bytes(2**20))
    line = ["ray", "job", "submit", "--working-dir", str(tmp_path), "--", "python", "main.py"]
    code, output = stack.execute("ray-head", line, timeout=200)
    assert f"files ['.gitignore', 'main.py'] {sys.executable}" in output, "the job's own output is streamed"
    assert code == 1, "a failed job fails the command"


def test_the_documented_command_trains_and_is_scaled_stopped_and_resumed(
    stack: Stack, first: subprocess.Popen[str]
) -> None:
    run = stack.directory / "runs" / "demo"
    wait_for(lambda: read_metrics(run / "metrics.jsonl") or first.poll() is not None, 400)
    for words in (["flashdmd", "scale", "/runs/demo", "reward=2"], ["ray", "job", "stop", "first"]):
        code, output = stack.execute("ray-head", words, timeout=200)
        assert code == 0, output
    _, output = finish(first, timeout=60)
    assert "Job 'first' was stopped" in output
    done = read_metrics(run / "metrics.jsonl")[-1]["step"]
    code, output = stack.execute("ray-head", [*TRAIN, *SHORT, f"steps={done + 1}"], timeout=400)
    assert code == 0, output
    assert f"resuming after step {done}" in output
    assert "preference/loss" in (run / "metrics.jsonl").read_text()
    assert (run / "export" / "model_index.json").is_file()


def test_mlflow_has_the_run_and_its_model_and_refuses_other_host_names(stack: Stack) -> None:
    port = stack.port("mlflow", 5000)
    api = f"http://127.0.0.1:{port}/api/2.0/mlflow"
    status, body = call(f"{api}/registered-models/get?name=flashdmd_ray")
    assert status == 200, body
    (version,) = json.loads(body)["registered_model"]["latest_versions"]
    status, body = call(f"{api}/runs/get?run_id={version['run_id']}")
    assert json.loads(body)["run"]["info"]["status"] == "FINISHED"
    request = urllib.request.Request(f"http://127.0.0.1:{port}/health", headers={"Host": "rebound.example.com"})
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).status == 200
    request = urllib.request.Request(f"{api}/experiments/get?experiment_id=0", headers={"Host": "rebound.example.com"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 403


def test_the_documented_command_serves_it_and_the_wheel_has_its_presets(stack: Stack) -> None:
    assert documented("docker compose up --detach --wait") == ["serve"]
    stack.start("serve")
    for words, said, wanted in (
        (["python", "-c", "import flashdmd_ray; print(flashdmd_ray.__file__)"], str(stack.directory), 0),
        (["flashdmd", "train", "sdxl_lora_24gb", "--dry-run"], "data/images does not exist", 2),
    ):
        code, output = stack.execute("ray-head", words, timeout=200)
        assert (code, said in output) == (wanted, True), output
    stack.wait_until_healthy(stack.running)
    images = f"http://127.0.0.1:{stack.port('serve', 8000)}/v1/images/generations"
    request = {"prompt": "a red 4 left of a green 7 on a gray background", "n": 2, "seed": 1}
    assert call(images, None, request)[0] == 401
    assert call(images, stack.secret("ray_auth_token"), request)[0] == 401
    status, body = call(images, stack.secret("api_keys"), request)
    assert status == 200, body
    pictures = [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in json.loads(body)["data"]]
    assert [picture.size for picture in pictures] == [(24, 24)] * 2


@pytest.mark.prometheus
def test_prometheus_answers_what_dashboards_and_rules_ask(stack: Stack, prometheus: Prometheus) -> None:
    """After the training and the request of the tests above."""
    assert prometheus.unanswered(expressions(), limit=60) == []
