"""`jobs/serve.py` as a process: from the line that says ready to an orderly end."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import requests

from tests.serving.exports import export_demo
from tests.serving.test_service import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path):
    """The process, in a group of its own, and its URL."""
    port = free_port()
    export = export_demo(tmp_path / "demo" / "export")
    arguments = [sys.executable, "jobs/serve.py", str(export), "--port", str(port)]
    arguments += ["--set", "teacher_steps=100", f"cache={tmp_path / 'cache'}", "watch_s=null"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    with subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    ) as process:
        yield process, f"http://127.0.0.1:{port}"
        if process.poll() is None:
            process.kill()


def test_a_terminated_service_finishes_what_it_has(command):
    process, url = command
    assert process.stdout is not None
    said = next(line for line in process.stdout if line.startswith(("ready", "error")))
    assert said == f"ready: {url}/\n"
    tree = psutil.Process(process.pid).children(recursive=True)
    threading.Thread(target=process.stdout.read, daemon=True).start()
    assert next(model["id"] for model in requests.get(f"{url}/v1/models", timeout=30).json()["data"]) == "demo"

    answers = []
    body = {"prompt": "a red 4", "model": "demo:teacher"}
    asking = threading.Thread(
        target=lambda: answers.append(requests.post(f"{url}/v1/images/generations", json=body, timeout=120))
    )
    asking.start()
    while "flashdmd_requests_inside 1.0" not in requests.get(f"{url}/metrics", timeout=30).text:
        assert asking.is_alive(), "the request was over before the signal"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    asking.join(timeout=10)
    assert [answer.status_code for answer in answers] == [200]
    assert psutil.wait_procs(tree, timeout=30)[1] == []
