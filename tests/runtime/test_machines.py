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

DRIVER = Path(__file__).parent / "machines_driver.py"
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
STORE = 75 * 2**20
"""Bytes of a machine's object store, the fewest that Ray allows."""

Process = subprocess.Popen[str]


@contextmanager
def node(port: int, *options: str) -> Iterator[Process]:
    """A machine of that head's port, or the head. Yields at once."""
    place = () if "--head" in options else (f"--address=127.0.0.1:{port}", f"--object-store-memory={STORE}")
    command = [sys.executable, str(NODE), "start", "--disable-usage-stats", "--block", *place, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            yield process
        finally:
            end(process)


def raylet(node: Process) -> psutil.Process:
    """Wait for the parent of all workers of a machine."""
    assert node.stdout is not None
    next(line for line in node.stdout if "Ray runtime started" in line)
    return next(child for child in psutil.Process(node.pid).children() if child.name() == "raylet")


def end(node: Process) -> None:
    """End a machine with everything that runs on it."""
    tree = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    node.kill()
    for child in tree:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def line_of(process: Process, beginning: str) -> str:
    """Wait until it prints a line of that kind."""
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith(beginning))


def homes(driver: Process, beginning: str) -> list[int]:
    """Process ids of the raylets of the workers in a line of the driver."""
    return [psutil.Process(int(pid)).ppid() for pid in line_of(driver, beginning).split()[1:]]


def test_a_job_spreads_over_machines_and_lives_on_when_they_come_and_go() -> None:
    """It waits for room, spills what the object stores cannot hold, uses a machine that is added, and outlives the loss of one.

    Though Ray itself goes on for a while to start workers on the lost one.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = ENVIRONMENT | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder, ExitStack() as ends:
        head = node(
            port, "--head", f"--port={port}", f"--temp-dir={folder}", "--num-cpus=0", "--include-dashboard=false"
        )
        raylet(ends.enter_context(head))
        command = [sys.executable, str(DRIVER), folder]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        ends.callback(driver.kill)
        waits = line_of(driver, "waiting for room")
        assert "learner 1 x (0 GPUs, 3 CPUs)" in waits
        assert "free are 0 of 0 GPUs and 0 of 0 CPUs on 1 machine" in waits
        nodes, raylets = [], []
        for _ in range(2):  # one after the other: Ray looks for free ports some time before it takes them
            nodes.append(ends.enter_context(node(port, "--num-cpus=4", "--num-gpus=1")))
            raylets.append(raylet(nodes[-1]).pid)
        learner, rollout = homes(driver, "workers")
        assert sorted([learner, rollout]) == sorted(raylets)
        assert int(line_of(driver, "spilled").split()[1]) > STORE
        assert line_of(driver, "equal") == "equal True\n"
        assert "placement.reward: " in line_of(driver, "full")
        found = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment, check=True)
        assert found.stdout == "2 GPUs in the cluster, used so: a learner on each of 2, with all other roles within\n"
        added = raylet(ends.enter_context(node(port, "--num-cpus=5"))).pid
        assert sorted(homes(driver, "rewards")) == sorted([learner, added])
        end(nodes[raylets.index(learner)])
        assert homes(driver, "workers") == [added, rollout]
