"""The stack of docker-compose.yml runs, trains and serves: its services as processes on the loopback address, with the commands of
docs/deployment.md and the package installed from a wheel. The one head that the suite starts as an operator would."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from compose_file import ROOT
from PIL import Image
from stack import Stack

DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()
SHORT = [
    "steps=1",
    "batch=2",
    "preference.updates=1",
    "preference.batch=2",
    "preference.candidates=2",
    "evaluation.samples=2",
    "evaluation.batch=2",
    "evaluation.student_steps=[4]",
    "evaluation.teacher_steps=2",
]
"""The demo with as little to do as it can have."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """`docker compose up`: the services without a profile, each once those it depends on are healthy."""
    stack = Stack.create()
    try:
        for name in ("ray-head", "mlflow"):
            stack.start(name)
        for number in range(1, stack.file["services"]["ray-worker"]["deploy"]["replicas"] + 1):
            stack.start("ray-worker", number)
        stack.wait_until_healthy(stack.running)
        yield stack
        ended = stack.stop()
        assert None not in ended.values(), ended
        assert [process.cmdline() for process in stack.left_behind()] == []
    finally:
        stack.remove()


def documented(start: str) -> list[str]:
    """The command of docs/deployment.md that begins with `start`, without it."""
    (line,) = re.findall(rf"^{re.escape(start)} (.*)$", DEPLOYMENT, re.MULTILINE)
    return shlex.split(line, comments=True)


def submit(stack: Stack, working_dir: Path, *command: str) -> CompletedProcess[str]:
    line = ["ray", "job", "submit", "--working-dir", str(working_dir), "--", *command]
    return stack.execute("ray-head", line, timeout=200)


def call(url: str, key: str | None = None, body: object = None) -> tuple[int, bytes]:
    """HTTP status and body."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, headers=headers, data=None if body is None else json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_job_api_wants_the_token(stack: Stack) -> None:
    jobs = f"http://127.0.0.1:{stack.port('ray-head', 8265)}/api/jobs/"
    assert call(jobs)[0] == 401
    assert call(jobs, "0" * 64)[0] in (401, 403)
    assert call(jobs, stack.secret("ray_auth_token"))[0] == 200


def test_a_script_runs_with_this_interpreter_and_without_what_git_ignores(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import os, sys, flashdmd_ray\nprint('files', sorted(os.listdir('.')), sys.executable)\nsys.exit(int(sys.argv[1]))\n"
    )
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for ignored in ("runs", "work", ".venv", "deploy/secrets"):
        (tmp_path / ignored).mkdir(parents=True)
        (tmp_path / ignored / "large.bin").write_bytes(bytes(2**20))
    done = submit(stack, tmp_path, "python", "main.py", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"files ['.gitignore', 'main.py'] {sys.executable}" in done.stdout, "the job's own output is streamed"
    assert submit(stack, tmp_path, "python", "main.py", "3").returncode == 1, "a failed job fails the command"


def test_the_documented_command_trains_the_demo_on_the_workers(stack: Stack) -> None:
    command = [*documented("docker compose exec ray-head"), *SHORT]
    done = stack.execute("ray-head", command, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    run = stack.directory / "runs" / "demo"
    assert "preference/loss" in (run / "metrics.jsonl").read_text()
    assert (run / "export" / "model_index.json").is_file()


def test_the_wheel_plans_its_presets_and_exports_the_run(stack: Stack) -> None:
    for words, said, code in (
        (["python", "-c", "import flashdmd_ray; print(flashdmd_ray.__file__)"], str(stack.directory), 0),
        (["flashdmd", "train", "sdxl_lora_24gb", "--dry-run"], "data/images does not exist", 2),
        (["flashdmd", "export", "/runs/demo", "--out", "/runs/exported"], "written to", 0),
    ):
        done = stack.execute("ray-head", words, timeout=200)
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout + done.stderr
    assert (stack.directory / "runs/exported/model_index.json").is_file()


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


def test_the_documented_command_serves_it(stack: Stack) -> None:
    assert documented("docker compose up --detach --wait") == ["serve"]
    stack.start("serve")
    stack.wait_until_healthy(stack.running)
    images = f"http://127.0.0.1:{stack.port('serve', 8000)}/v1/images/generations"
    request = {"prompt": "a red 4 left of a green 7 on a gray background", "n": 2, "seed": 1}
    assert call(images, None, request)[0] == 401
    assert call(images, stack.secret("ray_auth_token"), request)[0] == 401
    status, body = call(images, stack.secret("api_keys"), request)
    assert status == 200, body
    pictures = [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in json.loads(body)["data"]]
    assert [picture.size for picture in pictures] == [(24, 24)] * 2
