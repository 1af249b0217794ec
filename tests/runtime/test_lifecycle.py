"""Whatever ends a job, nothing of it is left running, and its private Ray is not on the network."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flashdmd_ray.runtime import cluster

DRIVER = Path(__file__).parent / "lifecycle_driver.py"


@pytest.fixture
def driver() -> Iterator[subprocess.Popen[str]]:
    """A running job in a process group of its own, as a terminal would start it; compose files leave RAY_ADDRESS empty."""
    environment = os.environ | {"RAY_ADDRESS": ""}
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


@pytest.mark.parametrize("victim", ["gcs_server"])  # the chaos harness kills raylets too
def test_a_lost_ray_is_replaced_and_a_killed_driver_takes_it_along(driver: subprocess.Popen[str], victim: str) -> None:
    lost = processes_of(driver)
    next(process for process in lost if process.name() == victim).kill()
    tree = processes_of(driver)
    assert_gone(lost)
    agents = [process for process in tree if process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    driver.kill()
    driver.wait(timeout=150)
    # Ray's two agents first try to report the loss to the server that died with the driver: they follow a minute later.
    assert_gone([process for process in tree if process not in agents])


def test_a_finished_job_leaves_nothing_and_needs_no_proxy(tmp_path: Path) -> None:
    """Its temporary folder is too deep for the sockets of Ray, and the environment names a proxy."""
    before = {process.pid for process in psutil.process_iter()}
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    deep.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
        environment = os.environ | {"RAY_ADDRESS": "", "TMPDIR": str(deep)}
        environment |= dict.fromkeys([*names, *map(str.upper, names)], url)
        for name in ("no_proxy", "NO_PROXY", "RAY_TMPDIR"):
            environment.pop(name, None)
        command = [sys.executable, str(DRIVER)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=True)
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert done.stdout.splitlines()[-1] == "closed"
    time.sleep(0.5)
    session = [p for p in psutil.process_iter() if p.pid not in before and "raylet" in p.name() and p.ppid() == 1]
    assert not session


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=rf"RAY_ADDRESS={address}: cannot join a Ray there .*does not answer as Ray"
        ):
            cluster.join_running(address)
    with pytest.raises(
        ValueError, match=rf"RAY_ADDRESS={address}: cannot join a Ray there .*refused.*unset RAY_ADDRESS"
    ):
        cluster.join_running(address)
