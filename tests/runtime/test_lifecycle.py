"""Whatever ends a job, nothing of it is left running, and its private Ray is not on the network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

DRIVER = Path(__file__).parent / "lifecycle_driver.py"


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[str]]:
    """A running job in a process group of its own, as a terminal would start it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(DRIVER), "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0) as process:
        yield process
        if process.poll() is None:
            process.kill()


def processes_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Wait for the worker; then all processes of the job, Ray's included."""
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("worker"):
            break
    tree = psutil.Process(driver.pid).children(recursive=True)
    assert int(line.split()[1]) in [process.pid for process in tree]
    assert any("raylet" in process.name() for process in tree)
    return tree


def assert_gone(tree: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive, [process.cmdline() for process in alive]


def test_ctrl_c_reaches_every_process(driver: subprocess.Popen[str]) -> None:
    tree = processes_of(driver)
    listening = {
        connection.laddr.ip
        for process in tree
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    os.killpg(driver.pid, signal.SIGINT)
    assert driver.wait(timeout=150) == -signal.SIGINT
    assert_gone(tree)


def test_a_killed_driver_takes_ray_with_it(driver: subprocess.Popen[str]) -> None:
    tree = processes_of(driver)
    agents = [process for process in tree if process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    driver.kill()
    driver.wait(timeout=150)
    # Ray's two agents first try to report the loss to the server that died with the driver: they follow a minute later.
    assert_gone([process for process in tree if process not in agents])


def test_a_finished_job_leaves_nothing() -> None:
    before = {process.pid for process in psutil.process_iter()}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(DRIVER)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=True)
    assert done.stdout.splitlines()[-1] == "closed"
    time.sleep(0.5)
    session = [p for p in psutil.process_iter() if p.pid not in before and "raylet" in p.name() and p.ppid() == 1]
    assert not session
