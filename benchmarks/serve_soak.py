"""A long run of the service under clients of all kinds while its processes are killed.

    python benchmarks/serve_soak.py [--requests 100000] [--seconds 720] [--kill-every 20] [--replicas 3]

Whichever comes first ends it. Clients draw images of mixed number, format and length of prompt, send their body slowly, leave before the
answer, ask for the models, or send what must be refused. Every fourth kill is Serve's controller, the others are replicas. Bars: every
answer has the status that its request deserves (429 where the queue is full), none is above 499, no request is lost, memory at the end
is at most 5 % above that after a tenth of the run (of the command, which answers HTTP, and Ray's own; what was replaced starts anew),
and a kill adds at most one second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from serve_load import Service, client, export_demo, median, percentile, running_service

PERIOD_S = 2.0
BEFORE_S = 4.0
"""From a moment that nothing happens at to a kill. The slowest of many requests is longer than the median without any fault."""
LEFT = -1
"""Status of a request whose client did not wait for the answer."""
SHARES = {"draw": 14, "slow": 3, "leave": 3, "list": 20, "refused": 60}
"""Shares of the kinds of request, in percent."""
REFUSED: tuple[tuple[int, bytes, Mapping[str, str]], ...] = (
    (400, b'{"prompt": ', {}),
    (400, b'{"prompt": "x", "n": 11}', {}),
    (400, b'{"prompt": "x", "size": "1x1"}', {}),
    (404, b'{"prompt": "x", "model": "none"}', {}),
    (401, b'{"prompt": "x"}', {"Authorization": "Bearer none"}),
    (413, b'{"prompt": "' + b"x" * 70_000 + b'"}', {}),
    (415, b'{"prompt": "x"}', {"Content-Type": "text/plain"}),
)
"""Status that is right, body, and headers that differ from the others'."""


@dataclass(frozen=True)
class Seen:
    """One request. right: the status it deserves."""

    kind: str
    right: int
    status: int
    seconds: float
    sent: float


class Killer(threading.Thread):
    """Kills a process every so often, and remembers when: the oldest replica, never the last that is up, or Serve's controller.

    up_after: seconds that a replica takes to start.
    """

    def __init__(self, service: Service, every: float, up_after: float) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._every = every
        self._up_after = up_after
        self._stop = threading.Event()
        self.kills: list[float] = []
        self.controllers = 0

    def run(self) -> None:
        for number in itertools.count(1):
            if self._stop.wait(self._every):
                return
            if number % 4 == 0:
                next(process for kind, process in self._service.processes() if kind == "ServeController").kill()
                self.controllers += 1
                continue
            generators = [process for kind, process in self._service.processes() if kind == "Generator"]
            up = [process for process in generators if time.time() - process.create_time() > self._up_after]
            if len(up) > 1:
                min(up, key=psutil.Process.create_time).kill()
                self.kills.append(time.monotonic())

    def end(self) -> None:
        self._stop.set()


class Memory(threading.Thread):
    """Private memory of the service's processes by name, in MiB, sampled every PERIOD_S seconds."""

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._stop = threading.Event()
        self.seen: list[Mapping[str, float]] = []

    def run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.seen.append(self._now())

    def end(self) -> None:
        self._stop.set()

    def _now(self) -> Mapping[str, float]:
        found: Counter[str] = Counter()
        for kind, process in self._service.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[kind] += process.memory_full_info().uss / 2**20
        return found


def drawn(chance: random.Random) -> bytes:
    """The body of a request for images."""
    body: dict[str, Any] = {"prompt": "a red 3 on gray, " * chance.randrange(1, 50), "seed": chance.randrange(1000)}
    body |= {"n": chance.choice([1, 1, 1, 2, 4]), "output_format": chance.choice(["png", "webp", "jpeg"])}
    return json.dumps(body).encode()


async def slowly(body: bytes, seconds: float) -> AsyncIterator[bytes]:
    """The body in ten pieces."""
    for start in range(0, len(body), piece := -(-len(body) // 10)):
        yield body[start : start + piece]
        await asyncio.sleep(seconds / 10)


async def ask(session: aiohttp.ClientSession, url: str, chance: random.Random) -> Seen:
    """Make one request of a kind drawn by its share."""
    kind = chance.choices(list(SHARES), list(SHARES.values()))[0]
    right, data, changed = chance.choice(REFUSED) if kind == "refused" else (200, drawn(chance), {})
    page, method = ("models", "GET") if kind == "list" else ("images/generations", "POST")
    body = slowly(data, 3 * chance.random()) if kind == "slow" else None if kind == "list" else data
    limit = aiohttp.ClientTimeout(total=0.3 * chance.random() if kind == "leave" else 120)
    sent, headers = time.monotonic(), {"Content-Type": "application/json", **changed}
    try:
        async with session.request(method, f"{url}/v1/{page}", data=body, headers=headers, timeout=limit) as response:
            await response.read()
            status = response.status
    except (TimeoutError, aiohttp.ClientError, OSError):
        status = LEFT if kind == "leave" else 0
    return Seen(kind, right, status, time.monotonic() - sent, sent)


async def keep_asking(url: str, options: argparse.Namespace) -> list[Seen]:
    """Let the clients ask at once, each again when it was answered."""
    answers: list[Seen] = []
    numbers, end = iter(range(options.requests)), time.monotonic() + options.seconds

    async def one(session: aiohttp.ClientSession, chance: random.Random) -> None:
        while time.monotonic() < end and next(numbers, None) is not None:
            answers.append(await ask(session, url, chance))

    async with client() as session:
        await asyncio.gather(*(one(session, random.Random(number)) for number in range(options.clients)))
    return answers


def report(answers: list[Seen], killer: Killer, memory: Memory) -> None:
    """Print counts, latencies and memory beside their bars."""
    for kind in SHARES:
        statuses = Counter(answer.status for answer in answers if answer.kind == kind)
        print(f"{kind}: {dict(sorted(statuses.items()))}")
    wrong = Counter(
        (a.kind, a.right, a.status) for a in answers if a.status not in (a.right, 429, LEFT) or a.status >= 500
    )
    print(f"{len(answers)} requests; with a status that is not theirs (kind, right, found): {dict(wrong)} (bar: none)")
    draws = [answer for answer in answers if answer.kind == "draw" and answer.status == 200]
    under_way = [[a for a in draws if a.sent <= kill <= a.sent + a.seconds] for kill in killer.kills]
    touched = {id(answer) for answers in under_way for answer in answers}
    others = [answer for answer in draws if id(answer) not in touched]
    usual = [answer.seconds for answer in others]
    print(f"latency: median {median(usual):.2f} s, p99 {percentile(usual, 0.99):.2f} s, longest {max(usual):.2f} s")
    print(
        f"{len(killer.kills)} kills of replicas, {killer.controllers} of the controller, {len(touched)} draws under way"
    )
    before = [[a for a in others if a.sent <= kill - BEFORE_S <= a.sent + a.seconds] for kill in killer.kills]
    for found, moments in (("of each kill", under_way), (f"{BEFORE_S:g} s before each, without one,", before)):
        slowest = sorted(max(answer.seconds for answer in answers) for answers in moments if answers)
        more = ", ".join(f"{seconds - median(usual):.2f}" for seconds in slowest)
        print(f"the slowest under way {found} was longer than the median by {more} s (bar for a kill: 1)")
    tenth = len(memory.seen) // 10
    for kind in ("command", "Ray"):
        seen = [each[kind] for each in memory.seen[tenth:]]
        start, end = median(seen[:tenth]), median(seen[-tenth:])
        print(f"memory of {kind}: {start:.0f} -> {end:.0f} MiB, {100 * (end / start - 1):+.1f} % (bar: 5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=720.0)
    parser.add_argument(
        "--kill-every", type=float, default=20.0, metavar="SECONDS", help="0: never (default: %(default)s)"
    )
    parser.add_argument(
        "--up-after",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that a replica takes to start, at most (default: %(default)s)",
    )
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument(
        "--replicas", type=int, default=3, help="so many that one is up while others start (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        args = {
            "models": {"demo": str(export_demo(root / "demo"))},
            "teachers": False,
            "cache": str(root / "cache"),
            "replica": {"count": options.replicas, "batch": 16, "threads": 1},
        }
        with running_service(args) as service:
            killer, memory = Killer(service, options.kill_every or float("inf"), options.up_after), Memory(service)
            memory.start()
            if options.kill_every:
                killer.start()
            answers = asyncio.run(keep_asking(service.url, options))
            killer.end()
            memory.end()
        report(answers, killer, memory)


if __name__ == "__main__":
    main()
