"""A long run of the service while its replicas are killed.

    python benchmarks/serve_soak.py [--requests 20000] [--seconds 600] [--kill-every 20] [--replicas 3]

Whichever comes first ends it. Bars: no answer above 499, no request lost, memory at the end at most 5 % above that after a tenth of the
run (of the command, which answers HTTP, Serve's controller, and Ray's own; a generator that was replaced starts anew), and a kill adds
at most one second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import psutil
from serve_load import Answer, Service, export_demo, keep_asking, median, percentile, running_service

PERIOD_S = 2.0


class Killer(threading.Thread):
    """Kills the oldest replica every so often, never the last that is up; remembers when. up_after: seconds that one takes to start."""

    def __init__(self, service: Service, every: float, up_after: float) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._every = every
        self._up_after = up_after
        self._stop = threading.Event()
        self.kills: list[float] = []

    def run(self) -> None:
        while not self._stop.wait(self._every):
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


def report(answers: list[Answer], killer: Killer, memory: Memory) -> None:
    counts = Counter(answer.status for answer in answers)
    print(f"{len(answers)} requests: {dict(counts)} (bar: no 5xx, none lost: status 0)")
    at_kills = [
        [answer for answer in answers if answer.sent <= kill <= answer.sent + answer.seconds] for kill in killer.kills
    ]
    touched = {id(answer) for under_way in at_kills for answer in under_way}
    others = [answer.seconds for answer in answers if id(answer) not in touched]
    print(f"latency: median {median(others):.2f} s, p99 {percentile(others, 0.99):.2f} s, longest {max(others):.2f} s")
    if touched:
        slowest = sorted(max(answer.seconds for answer in under_way) for under_way in at_kills if under_way)
        print(
            f"{len(killer.kills)} kills, {len(touched)} requests under way; the slowest of each kill was longer than the median by"
        )
        print("  " + ", ".join(f"{seconds - median(others):.2f}" for seconds in slowest) + " s (bar: 1)")
    start, end = memory.seen[len(memory.seen) // 10], memory.seen[-1]
    for kind in sorted(end):
        if kind != "Generator" or not killer.kills:
            growth = end[kind] / start[kind] - 1
            print(f"memory of {kind}: {start[kind]:.0f} -> {end[kind]:.0f} MiB, {100 * growth:+.1f} % (bar: 5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=600.0)
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
    parser.add_argument("--clients", type=int, default=8)
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

            def done(number: int, passed: float) -> bool:
                return number >= options.requests or passed >= options.seconds

            def body(number: int) -> Mapping[str, object]:
                return {"prompt": f"a red {number % 10} on a gray background, {number}", "seed": number}

            answers = asyncio.run(keep_asking(service.url, options.clients, done, body))
            killer.end()
            memory.end()
        report(answers, killer, memory)


if __name__ == "__main__":
    main()
