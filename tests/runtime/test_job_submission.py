"""A cluster as an operator starts it: a head of its own, token authentication, and jobs submitted with a working
directory."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


@dataclass(frozen=True)
class Head:
    """A running head node: the address of its job API and the environment in which a client reaches it."""

    address: str
    environment: dict[str, str]

    def submit(self, working_dir: Path, *command: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
        line = [str(RAY), "job", "submit", "--address", self.address, "--working-dir", str(working_dir), "--", *command]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False)


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def status_of(url: str, token: str | None) -> int | None:
    """HTTP status of a GET; None when nothing listens."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head --block` on ports of its own, ended by SIGTERM to that process alone: `ray stop` would end
    every Ray of the machine."""
    directory = Path(
        tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    )  # short: socket paths below it have at most 107 characters
    token = directory / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": os.pathsep.join([str(RAY.parent), environment["PATH"]]),  # jobs run the `python` found here
    }
    gcs, dashboard, client, metrics, listen, environments, export = free_ports(7)
    command = [
        str(RAY),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        f"--temp-dir={directory}",
        f"--port={gcs}",
    ]
    command += [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
    ]
    command += [
        f"--dashboard-agent-grpc-port={metrics}",
        f"--dashboard-agent-listen-port={listen}",
        f"--runtime-env-agent-port={environments}",
    ]
    command += [f"--metrics-export-port={export}", "--num-cpus=8", f"--object-store-memory={256 * 2**20}"]
    address = f"http://127.0.0.1:{dashboard}"
    with (
        (directory / "head.log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_ready(process, f"{address}/api/version", token.read_text(), directory / "head.log")
            yield Head(address, environment)
        finally:
            process.terminate()
            process.wait(timeout=60)
    shutil.rmtree(directory, ignore_errors=True)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, token: str, log: Path) -> None:
    give_up = time.monotonic() + 240
    while "Ray runtime started" not in log.read_text() or status_of(url, token) != 200:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.5)


def test_a_script_runs_with_this_interpreter_and_without_what_git_ignores(head: Head, tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(
        "import os, sys, flashdmd_ray\nprint('files', sorted(os.listdir('.')), sys.executable)\nsys.exit(int(sys.argv[1]))\n"
    )
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for ignored in ("runs", "work", ".venv"):
        (tmp_path / ignored).mkdir()
        (tmp_path / ignored / "large.bin").write_bytes(bytes(2**20))
    done = head.submit(tmp_path, "python", "main.py", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"files ['.gitignore', 'main.py'] {sys.executable}" in done.stdout, "the job's own output is streamed"
    assert head.submit(tmp_path, "python", "main.py", "3").returncode == 1, "a failed job fails the command"


def test_the_api_wants_the_token(head: Head) -> None:
    assert status_of(f"{head.address}/api/jobs/", None) == 401
    assert status_of(f"{head.address}/api/jobs/", "0" * 64) in (401, 403)
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert status_of(f"{head.address}/api/jobs/", token) == 200


def test_joint_training_as_a_job(head: Head, tmp_path: Path) -> None:
    """The real job from the real working directory, with as little to do as it can have."""
    settings = ["steps=1", "batch=2", "preference.updates=1", "preference.batch=2", "preference.candidates=2"]
    settings += [
        "evaluation.samples=2",
        "evaluation.batch=2",
        "evaluation.student_steps=[4]",
        "evaluation.teacher_steps=2",
    ]
    settings += ["tracking.enabled=false", f"run.dir={tmp_path}", "run.name=job"]
    done = head.submit(ROOT, "python", "jobs/joint_train.py", "--set", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (package,) = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).parent.glob(
        "session_2*/runtime_resources/working_dir_files/*/jobs"
    )
    uploaded = [path.name for path in package.parent.iterdir()]
    assert not {".venv", ".git", "runs", "work"} & set(uploaded), uploaded
    metrics = (tmp_path / "job" / "metrics.jsonl").read_text()
    assert "preference/loss" in metrics
