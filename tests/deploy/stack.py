"""The services of docker-compose.yml as processes of this machine.

A container gives a service a host name, ports, mounted volumes and secrets, and an image. Here these become the loopback address, free
ports, folders and files of a temporary directory, and a wheel of this project installed there, over the dependencies of this interpreter.
Commands, variables and health checks are otherwise those of the file.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from compose_file import ROOT, read

from flashdmd_ray.runtime.cluster import SYSTEM_CONFIG

BIN = Path(sys.executable).parent
CONTAINER = "FLASHDMD_TEST_CONTAINER"
RESTARTS = 3
START_S, CHECK_S = 400.0, 10.0
"""Limits for a service to become healthy, and for one look, on a busy machine; the file's own are for machines of one's own."""
STOP_S = 60.0
"""`stop_grace_period` of the services."""


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@dataclass
class Running:
    """One container of a service, as a process."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    health_command: list[str]
    log: Path
    restarts: int = 0

    def is_healthy(self) -> bool:
        """Whether it runs and the health check of the compose file says so, now."""
        if self.process.poll() is not None:
            return False
        try:
            check = subprocess.run(
                self.health_command, env=self.environment, capture_output=True, timeout=CHECK_S, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return check.returncode == 0


@dataclass
class Stack:
    """What `docker compose up` starts."""

    directory: Path
    file: dict[str, Any]
    running: dict[str, Running] = field(default_factory=dict)
    ports: dict[tuple[str, int], int] = field(default_factory=dict)
    """(container, port in the container) -> port of the loopback address."""

    @classmethod
    def create(cls) -> Stack:
        directory = Path(
            tempfile.mkdtemp(prefix="fd-", dir="/tmp")
        )  # short: Ray's sockets are below it, 107 characters at most
        file = read()
        install(directory)
        (directory / "app").mkdir()
        (directory / "secrets").mkdir(mode=0o700)
        for name in file["secrets"]:
            (directory / "secrets" / name).write_text(secrets.token_hex(32))
        for name in file["volumes"]:
            (directory / name).mkdir()
        return cls(directory, file)

    def secret(self, name: str) -> str:
        return (self.directory / "secrets" / name).read_text()

    def port(self, container: str, inside: int) -> int:
        return self.ports.setdefault((container, inside), free_ports(1)[0])

    def here(self, text: str, container: str) -> str:
        """A word of a command or variable with what the container would give it replaced."""
        text = text.replace("/run/secrets/", f"{self.directory}/secrets/")
        for volume in self.file["volumes"]:
            text = re.sub(rf"(?<![\w.-])/{volume}(?=[/\s]|$)", f"{self.directory}/{volume}", text)
        for host in self.file["services"]:
            text = re.sub(
                rf"\b{host}:(\d+)", lambda match, host=host: f"127.0.0.1:{self.port(host, int(match[1]))}", text
            )
        text = re.sub(
            r"127\.0\.0\.1:(\d{4,5})", lambda match: f"127.0.0.1:{self.local(container, int(match[1]))}", text
        )
        text = re.sub(r"(port=)(\d+)$", lambda match: f"{match[1]}{self.local(container, int(match[2]))}", text)
        return text.replace("0.0.0.0", "127.0.0.1")

    def local(self, container: str, port: int) -> int:
        """The port that stands for `port` of this container; what already is one of ours stays."""
        return port if port in self.ports.values() else self.port(container, port)

    def environment(self, container: str, service: dict[str, Any]) -> dict[str, str]:
        machine = {
            "PATH": os.pathsep.join([str(self.directory / "venv/bin"), str(BIN), "/usr/local/bin", "/usr/bin", "/bin"]),
            "PYTHONPATH": str(packages(self.directory)),
            "HOME": str(self.directory),
            "RAY_TMPDIR": str(self.directory),
            # Ray replaces 127.0.0.1 by an interface's address unless told otherwise; and these machines are busy.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            "RAY_gcs_server_port_wait_time_s": "180",
            "RAY_metrics_report_interval_ms": "1000",
            "OMP_NUM_THREADS": "1",
            CONTAINER: container,
        }
        patience = {key: value for key, value in SYSTEM_CONFIG.items() if key.endswith(("_ms", "_seconds"))}
        machine |= {f"RAY_{key}": str(value) for key, value in patience.items()}
        machine |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        own = {key: self.here(value, container) for key, value in service.get("environment", {}).items()}
        return machine | image_environment() | own

    def start(self, name: str, number: int = 1) -> Running:
        """Start one container of a service, when those it depends on are healthy."""
        service = self.file["services"][name]
        container = name if number == 1 else f"{name}-{number}"
        self.wait_until_healthy(service.get("depends_on", {}))
        command = [self.here(word, container) for word in service["command"]]
        if command[:2] == ["ray", "start"]:
            command.append("--node-ip-address=127.0.0.1")
            if "--head" in command:
                command.append(f"--ray-client-server-port={free_ports(1)[0]}")
            else:
                command[:1] = ["python", str(Path(__file__).with_name("loopback_ray.py"))]
        environment = self.environment(container, service)
        command[0] = shutil.which(command[0], path=environment["PATH"]) or command[0]
        health = [self.here(word, container) for word in service["healthcheck"]["test"][1:]]
        health[0] = str(BIN / health[0])
        log = self.directory / f"{container}.log"
        process = _run(command, environment, log)
        self.running[container] = Running(container, command, process, environment, health, log)
        return self.running[container]

    def wait_until_healthy(self, containers: Iterable[str]) -> None:
        """Until their health checks succeed. A process that ended is started again, which is what `restart: unless-stopped` does: Ray
        gives a node 30 s to come up, a constant that a busy machine can miss."""
        give_up = time.monotonic() + START_S
        awaited = [self.running[container] for container in containers]
        while sick := [one for one in awaited if not one.is_healthy()]:
            text = "".join(f"{one.name} is not healthy:\n{one.log.read_text()[-3000:]}\n" for one in sick)
            assert time.monotonic() < give_up, text
            for one in sick:
                if one.process.poll() is not None:
                    assert one.restarts < RESTARTS, text
                    _kill(self.left_behind(one.name))
                    one.process = _run(one.command, one.environment, one.log)
                    one.restarts += 1
            time.sleep(0.5)

    def begin(self, container: str, command: list[str]) -> subprocess.Popen[str]:
        """Start a command in a service, like `docker compose exec`, without waiting for its end."""
        environment = self.running[container].environment
        words = [self.here(word, container) for word in command]
        words[0] = shutil.which(words[0], path=environment["PATH"]) or words[0]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, env=environment, cwd=self.directory / "app", stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def execute(self, container: str, command: list[str], timeout: float) -> tuple[int, str]:
        """Exit status and output of a command, as of `docker compose exec`."""
        return finish(self.begin(container, command), timeout)

    def stop(self) -> dict[str, int | None]:
        """As `docker compose stop`: SIGTERM, the newest service first. Exit status of each; None if it outlived its grace period."""
        newest_first = list(reversed(self.running.values()))
        for one in newest_first:
            one.process.terminate()
        give_up = time.monotonic() + STOP_S
        while any(one.process.poll() is None for one in newest_first) and time.monotonic() < give_up:
            time.sleep(0.1)
        return {one.name: one.process.returncode for one in newest_first}

    def left_behind(self, container: str | None = None) -> list[psutil.Process]:
        """Processes that were started in this stack's environment, or in that of one container, and still run."""
        wanted = {"RAY_TMPDIR": str(self.directory)} | ({} if container is None else {CONTAINER: container})
        return [process for process in psutil.process_iter() if wanted.items() <= _environment(process).items()]

    def remove(self) -> None:
        _kill(self.left_behind())
        shutil.rmtree(self.directory, ignore_errors=True)


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    """Exit status and output of a command that `begin` started; after the timeout it is killed."""
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    return process.returncode, output


def image_environment() -> dict[str, str]:
    """ENV of the image's target `cpu`, but for PATH."""
    stage = (ROOT / "deploy/Dockerfile").read_text().partition("FROM base AS runtime\n")[2].partition("\nFROM ")[0]
    return dict(word.split("=", 1) for line in re.findall(r"^ENV (.*)$", stage, re.MULTILINE) for word in line.split())


def install(directory: Path) -> None:
    """As the Dockerfile: the project as a wheel, without what else lies in the checkout."""
    source = directory / "source"
    shutil.copytree(ROOT / "flashdmd_ray", source / "flashdmd_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    uv = [str(BIN / "uv"), "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation"]
    target = ["--python", sys.executable, "--prefix", str(directory / "venv")]
    subprocess.run([*uv, *target, str(source)], check=True, timeout=300)
    shutil.rmtree(source)


def packages(directory: Path) -> Path:
    (folder,) = (directory / "venv").glob("lib/python*/site-packages")
    return folder


def _run(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(command, env=environment, cwd=log.parent / "app", stdout=output, stderr=output)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
