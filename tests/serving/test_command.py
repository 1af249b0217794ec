"""`jobs/serve.py` as a process that cannot start. One that serves and ends in order: tests/test_own_model_page.py."""

import os
import subprocess
import sys
from pathlib import Path

from tests.serving.exports import export_demo
from tests.serving.test_service import free_port

ROOT = Path(__file__).parents[2]


def outside_ray():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return environment


def test_a_model_that_cannot_be_loaded_ends_the_command_with_one_line(tmp_path):
    export = export_demo(tmp_path / "demo" / "export")
    weights = export / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    options = ["--port", str(free_port()), "--set", f"cache={tmp_path / 'cache'}", "watch_s=null"]
    line = [sys.executable, "jobs/serve.py", str(export), *options]
    ended = subprocess.run(line, cwd=ROOT, env=outside_ray(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert f"model demo: cannot load unet from {export}" in errors[0]
    assert "Traceback" not in ended.stdout + ended.stderr
