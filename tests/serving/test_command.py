"""`jobs/serve.py` as a process: from the line that says ready to an orderly end."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import ray
import requests
from ray import serve

from tests.serving.exports import export_demo
from tests.serving.test_service import free_port

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def serving(folder, **variables):
    """The process, in a group of its own, and its URL."""
    port = free_port()
    export = export_demo(folder / "demo" / "export")
    with subprocess.Popen(
        command_line(export, port, folder),
        cwd=ROOT,
        env=outside_ray() | variables,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        yield process, f"http://127.0.0.1:{port}"
        if process.poll() is None:
            process.kill()


def command_line(export, port, folder):
    options = ["--set", "teacher_steps=100", f"cache={folder / 'cache'}", "watch_s=null"]
    return [sys.executable, "jobs/serve.py", str(export), "--port", str(port), *options]


def outside_ray():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return environment


def wait_until_ready(process, url):
    said = next(line for line in process.stdout if line.startswith(("ready", "error")))
    assert said == f"ready: {url}/\n"


def test_a_model_that_cannot_be_loaded_ends_the_command_with_one_line(tmp_path):
    export = export_demo(tmp_path / "demo" / "export")
    weights = export / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = command_line(export, free_port(), tmp_path)
    ended = subprocess.run(line, cwd=ROOT, env=outside_ray(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"model demo: cannot load unet from {export}" in errors[0]
    assert "Traceback" not in ended.stdout + ended.stderr


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Neighbour:
    def __call__(self) -> str:
        return "here"


def ask_the_teacher(url):
    """A request that takes long, once it is inside; its answer comes into the list."""
    answers = []
    body = {"prompt": "a red 4", "model": "demo:teacher"}
    asking = threading.Thread(
        target=lambda: answers.append(requests.post(f"{url}/v1/images/generations", json=body, timeout=120))
    )
    asking.start()
    while "flashdmd_requests_inside 1.0" not in requests.get(f"{url}/metrics", timeout=30).text:
        assert asking.is_alive(), "the request was over before the signal"
    return asking, answers


@pytest.mark.usefixtures("ray_cluster")
def test_a_terminated_service_finishes_what_it_has_and_leaves_its_neighbours_alone(tmp_path):
    serve.start(proxy_location="Disabled")
    try:
        neighbour = serve.run(Neighbour.bind(), name="neighbour", route_prefix=None)
        with serving(tmp_path, RAY_ADDRESS=ray.get_runtime_context().gcs_address) as (process, url):
            wait_until_ready(process, url)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            drawn = requests.post(f"{url}/v1/images/generations", json={"prompt": "a red 4"}, timeout=60)
            assert drawn.status_code == 200, drawn.text
            assert set(serve.status().applications) == {"neighbour", "flashdmd_ray"}
            tree = psutil.Process(process.pid).children(recursive=True)
            asking, answers = ask_the_teacher(url)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            asking.join(timeout=10)
            assert [answer.status_code for answer in answers] == [200]
            assert psutil.wait_procs(tree, timeout=30)[1] == []
        assert set(serve.status().applications) == {"neighbour"}
        assert neighbour.remote().result(timeout_s=60) == "here"
    finally:
        serve.shutdown()
