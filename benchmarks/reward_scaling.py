"""Measure how a pool of rewards scales with its workers: `python benchmarks/reward_scaling.py [--calls N] [--out FILE]`.

A reward that sleeps 100 ms for a batch of 8 images, on 1, 2, 4 and 8 workers: calls per second against as many times one worker's, and what
a call costs beyond the reward's own time. Then the pool goes from 1 to 8 workers and back while calls run, and none may be lost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])  # the workers import the roles too

REWARD_S, BATCH, SIZES = 0.1, 8, (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=60, help="calls for each worker (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    import torch
    from simulated_roles import ROLES

    from flashdmd_ray.config import parse_config
    from flashdmd_ray.runtime import build_runtime

    costs = json.dumps({"reward": REWARD_S})
    config = parse_config({"rewards": [{"kind": "pickscore", "name": "slow", "path": costs}]})
    runtime = build_runtime(config, {"reward": ROLES["reward"]})
    try:
        images = torch.zeros(BATCH, 3, 64, 64, dtype=torch.uint8)
        found = measure(runtime, lambda: runtime.rewards["slow"].nothing(images), options.calls)
    finally:
        runtime.close()
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def measure(runtime: Any, call: Callable[[], float], calls: int) -> dict[str, Any]:
    pool = runtime.pools["slow"]
    call()  # the first one loads code
    one_by_one = [timed(call) for _ in range(calls)]
    found: dict[str, Any] = {
        "overhead_ms": 1000 * statistics.median(total - inside for total, inside in one_by_one),
        "overhead_ms_p90": 1000 * sorted(total - inside for total, inside in one_by_one)[int(0.9 * calls)],
    }
    for size in SIZES:
        pool.resize(size)
        pool.setup()
        seconds = flood(call, 2 * size, calls * size)
        found[f"calls_per_s_{size}"] = calls * size / seconds
        print(f"{size} workers: {calls * size / seconds:.1f} calls/s", file=sys.stderr, flush=True)
    found |= {f"of_linear_{size}": found[f"calls_per_s_{size}"] / (size * found["calls_per_s_1"]) for size in SIZES}
    found |= {f"of_ideal_{size}": found[f"calls_per_s_{size}"] / (size / REWARD_S) for size in SIZES}
    pool.resize(1)
    return found | resized(pool, call, calls)


def timed(call: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    inside = call()
    return time.perf_counter() - started, inside


def flood(call: Callable[[], float], threads: int, calls: int) -> float:
    """Seconds that `calls` calls from `threads` threads take."""
    left = iter(range(calls))
    lock, errors = threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            try:
                call()
            except Exception as error:
                errors.append(error)

    started = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors, errors[0]
    return time.perf_counter() - started


def resized(pool: Any, call: Callable[[], float], calls: int) -> dict[str, Any]:
    """1 to 8 workers and back while 16 threads call without a pause; every call must be answered."""
    answered = []

    def counted() -> float:
        inside = call()
        answered.append(time.perf_counter())
        return inside

    asked = 6 * calls  # enough to be at it before, during and after
    job = threading.Thread(target=flood, args=(counted, 16, asked))
    job.start()
    time.sleep(1)
    started = time.perf_counter()
    pool.resize(8)
    while pool.state().ready < 8 and job.is_alive():
        time.sleep(0.05)
    grown = time.perf_counter() - started
    time.sleep(2)
    pool.resize(1)
    job.join()
    return {
        "resize_asked": asked,
        "resize_answered": len(answered),
        "resize_1_to_8_s": grown,
        "workers_at_end": pool.state().ready,
    }


if __name__ == "__main__":
    main()
