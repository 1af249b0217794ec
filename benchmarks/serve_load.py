"""What the benchmarks of serving share: a demo export, a running service, and clients that keep asking.

Everything runs on this machine: Ray, the service and the clients share its cores, as the figures say.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "1",
    "FLASHDMD_API_KEYS": secrets.token_urlsafe(32),  # as behind HAProxy, which may be measured too
}.items():
    os.environ.setdefault(_name, _value)

TIMESTEPS = (999, 749, 499, 249)


@dataclass(frozen=True)
class Answer:
    """One request. status: 0 when the connection broke."""

    status: int
    seconds: float
    sent: float
    body: Mapping[str, Any]


def export_demo(out: Path, change: float = 1.0) -> Path:
    """The demo's teacher as a four-step student; `change` multiplies its weights."""
    from flashdmd_ray.demo import weights_path
    from flashdmd_ray.export import CardFacts, export_pipeline
    from flashdmd_ray.models.sdxl import SDXL

    family = SDXL.from_pretrained(str(weights_path("teacher")))
    facts = CardFacts("demo", "digit-scenes teacher of flashdmd_ray", "apache-2.0", cost={}, optimised_rewards=[])
    weights = {name: tensor * change for name, tensor in family.teacher.state_dict().items()}
    return export_pipeline(family, weights, TIMESTEPS, out, facts)


@contextlib.contextmanager
def running_service(args: Mapping[str, Any]) -> Iterator[str]:
    """The URL of a service with these settings, on a Ray of its own."""
    from flashdmd_ray.runtime.environment import use_loopback

    use_loopback(os.environ)

    from ray import serve

    from flashdmd_ray.runtime.cluster import Cluster
    from flashdmd_ray.serving.app import build_app

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cluster = Cluster.join()
    try:
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        serve.run(build_app(args), name="measured", route_prefix="/", logging_config=quiet)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        cluster.leave()


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """Connections that stay open."""
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {os.environ['FLASHDMD_API_KEYS']}"}
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> Answer:
    """One image request."""
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
    """`clients` at once, each asking again when it was answered, until(requests sent, seconds) is true.

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
    """share: 0 to 1."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, round(share * (len(ranked) - 1)))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
