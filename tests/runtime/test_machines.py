"""Machines of a cluster, here raylets on the loopback address, come and go."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

DRIVER = Path(__file__).parent / "lifecycle_driver.py"
NODE = Path(__file__).parents[1] / "deploy" / "loopback_ray.py"


ENVIRONMENT = os.environ | {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_agent_register_timeout_ms": "180000",  # a busy machine needs more than the usual 15 s
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "test" * 10,
    "PYTHONUNBUFFERED": "1",
}
USE = """from flashdmd_ray.config import load_config; from flashdmd_ray.plan import use_gpus
print(use_gpus(load_config("demo"))[1])"""


@contextmanager
def node(folder: str, port: int, *options: str) -> Iterator[psutil.Process]:
    """A machine: its raylet, with everything that runs on it. The head has no room for workers."""
    place = (
        [f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0"]
        if options
        else [f"--address=127.0.0.1:{port}", "--num-cpus=4", "--num-gpus=2"]
    )
    command = [sys.executable, str(NODE), "start", "--disable-usage-stats", "--block", *place, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            next(line for line in process.stdout if "Ray runtime started" in line)
            yield next(child for child in psutil.Process(process.pid).children() if child.name() == "raylet")
        finally:
            tree = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in tree:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def worker(driver: subprocess.Popen[str]) -> psutil.Process:
    """Wait until it says so."""
    assert driver.stdout is not None
    line = next(line for line in driver.stdout if line.startswith("worker"))
    return psutil.Process(int(line.split()[1]))


def test_a_job_waits_for_machines_and_after_the_loss_of_one_its_workers_start_on_another() -> None:
    """Though Ray itself goes on for a while to start workers on the lost one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(DRIVER), "wait", "learner"]
    environment = ENVIRONMENT | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder, ExitStack() as ends:
        ends.enter_context(node(folder, port, "--head", "--include-dashboard=false"))
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        ends.callback(driver.kill)
        assert driver.stdout is not None
        waits = next(line for line in driver.stdout if line.startswith("waiting for room"))
        assert "learner 1 x (0 GPUs, 0.5 CPUs); free are 0 of 0 GPUs and 0 of 0 CPUs on 1 machine" in waits
        with node(folder, port) as first:
            assert worker(driver).ppid() == first.pid
            found = subprocess.run(
                [sys.executable, "-c", USE], capture_output=True, text=True, env=environment, check=True
            )
            assert (
                found.stdout == "2 GPUs in the cluster, used so: a learner on each of 2, with all other roles within\n"
            )
        second = ends.enter_context(node(folder, port))
        assert worker(driver).ppid() == second.pid
