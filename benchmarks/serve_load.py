"""Shared parts of the serving benchmarks: a demo export, a running service, and clients that keep asking.

Everything runs on this machine: Ray, the service and the clients share its cores, as the figures say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil

from flashdmd_ray.run.variables import prepare_environment

prepare_environment(os.environ)  # the service is here, whatever a proxy says
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "1",
    "FLASHDMD_API_KEYS": secrets.token_urlsafe(32),  # as a service that others reach
}.items():
    os.environ.setdefault(_name, _value)

ROOT = Path(__file__).parents[1]
TIMESTEPS = (999, 749, 499, 249)
START_S = 300.0


@dataclass(frozen=True)
class Answer:
    """Answer to one request. status: 0 when the connection broke."""

    status: int
    seconds: float
    sent: float
    body: Mapping[str, Any]


def export_demo(out: Path, change: float = 1.0) -> Path:
    """The demo's teacher as a four-step student; `change` multiplies its weights."""
    from flashdmd_ray.demo import weights_path
    from flashdmd_ray.models.sdxl import SDXL
    from flashdmd_ray.results.export import export_pipeline
    from flashdmd_ray.results.model_card import CardFacts

    family = SDXL.from_pretrained(str(weights_path("teacher")))
    facts = CardFacts("demo", "digit-scenes teacher of flashdmd_ray", "apache-2.0", cost={}, optimised_rewards=[])
    weights = {name: tensor * change for name, tensor in family.teacher.state_dict().items()}
    return export_pipeline(family, weights, TIMESTEPS, out, facts)


class Service:
    """A running `jobs/serve.py`. url: without a slash at the end."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self._process = psutil.Process(process.pid)
        self.url = url

    def processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """The service's processes by name: "command" (which answers HTTP), "Generator", "ServeController", and Ray's own as "Ray".

        A worker that starts has no name of its own yet: "default_worker" or "IDLE".
        """
        yield "command", self._process
        for process in self._process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline())
                yield next((word for word in WORKERS if word in title), "Ray"), process


WORKERS = ("ServeController", "Generator", "default_worker", "IDLE")


@contextlib.contextmanager
def running_service(args: Mapping[str, Any]) -> Iterator[Service]:
    """`jobs/serve.py` with these settings (the arguments of `build_app`), as users start it, on a Ray of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = dict(args)
    models = [f"{name}={source}" for name, source in settings.pop("models").items()]
    command = [sys.executable, "jobs/serve.py", *models, "--port", str(port), "--set"]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            _wait_until_ready(process, log)
            yield Service(process, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(timeout=120)


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[str]) -> None:
    give_up = time.monotonic() + START_S
    while True:
        log.seek(0)
        said = log.read()
        if "\nready: " in said:
            return
        if process.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError(f"the service did not start:\n{said[-2000:]}")
        time.sleep(0.2)


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """HTTP client whose connections stay open."""
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {os.environ['FLASHDMD_API_KEYS']}"}
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Answer:
    """Send one image request."""
    sent = time.monotonic()
    try:
        async with session.post(f"{url}/v1/images/generations", json=body) as response:
            tree = await response.json(content_type=None)
            return Answer(response.status, time.monotonic() - sent, sent, tree)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        return Answer(0, time.monotonic() - sent, sent, {"error": repr(error)})


async def keep_asking(
    url: str,
    clients: int,
    until: Callable[[int, float], bool],
    body: Callable[[int], Mapping[str, Any]],
    answers: list[Answer] | None = None,
) -> list[Answer]:
    """Let `clients` ask at once, each again when it was answered, until `until(requests sent, seconds)` is true.

    body(number) -> a request. answers: where they are put; the same list is returned.
    """
    answers = [] if answers is None else answers
    began, number = time.monotonic(), 0

    async def one(session: aiohttp.ClientSession) -> None:
        nonlocal number
        while not until(number, time.monotonic() - began):
            number += 1
            answers.append(await ask(session, url, body(number)))

    async with client() as session:
        await asyncio.gather(*(one(session) for _ in range(clients)))
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share (0 to 1) of the values lies."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round(share * (len(ranked) - 1)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
