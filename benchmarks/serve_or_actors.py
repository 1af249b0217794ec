"""Pools of plain actors against Ray Serve deployments: `python benchmarks/serve_or_actors.py [--calls N] [--out FILE]`.

The same reward, which does nothing, in both: milliseconds that a call costs with 196 KB and with 3 MB of images; seconds until a call
that was killed on its way is answered after all; seconds until a second worker answers once calls queue. One Ray, one run, one after
the other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
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

from flashdmd_ray.runtime.environment import use_loopback  # noqa: E402

use_loopback(os.environ)
import torch  # noqa: E402
from simulated_roles import ROLES  # noqa: E402

IMAGES = {"196 KB": (16, 3, 64, 64), "3 MB": (16, 3, 256, 256)}
Call = Callable[[torch.Tensor, float], int]
"""(images, seconds to take) -> process that answered."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    import ray

    from flashdmd_ray.runtime.cluster import Cluster

    Cluster.join()
    found = {"actors": actors(options.calls)}
    found["serve"] = serve(options.calls)
    ray.shutdown()
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def actors(calls: int) -> dict[str, Any]:
    from flashdmd_ray.config import parse_config
    from flashdmd_ray.runtime import build_runtime

    placement = {"reward": {"workers": 1, "max_workers": 2, "shrink_after_s": 600}}
    settings = {"rewards": [{"kind": "pickscore", "name": "it", "path": "{}"}], "placement": placement}
    started = time.perf_counter()
    runtime = build_runtime(parse_config(settings), {"reward": ROLES["reward"]})
    try:
        up = time.perf_counter() - started
        return {"first_worker_s": up} | measure(lambda images, s: int(runtime.rewards["it"].busy(images, s)), calls)
    finally:
        runtime.close()


def serve(calls: int) -> dict[str, Any]:
    """The reward behind a Serve handle, with the retries that Serve leaves to its callers."""
    from ray import serve
    from ray.exceptions import RayActorError
    from simulated_roles import take_time

    @serve.deployment(
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=1,
        health_check_period_s=1,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 2,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 0.5,
            "metrics_interval_s": 0.25,
            "look_back_period_s": 0.5,
            "downscale_delay_s": 600,
        },
    )
    class Deployed:
        def __call__(self, images: Any, seconds: float) -> int:
            return take_time(seconds)

    started = time.perf_counter()
    serve.start(http_options={"location": "NoServer"})
    handle = serve.run(Deployed.bind(), name="it", route_prefix=None)
    up = time.perf_counter() - started

    def call(images: torch.Tensor, seconds: float) -> int:
        for _ in range(200):
            try:
                return int(handle.remote(images.numpy(), seconds).result(timeout_s=60))
            except RayActorError:
                time.sleep(0.05)
        raise TimeoutError("no replica came back")

    try:
        return {"first_worker_s": up} | measure(call, calls)
    finally:
        serve.shutdown()


def measure(call: Call, calls: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shape in IMAGES.items():
        images = torch.zeros(shape, dtype=torch.uint8)
        call(images, 0.0)
        spent = [_timed(call, images) for _ in range(calls)]
        found[f"ms_{name}"] = {"median": 1000 * statistics.median(spent), "p90": 1000 * sorted(spent)[int(0.9 * calls)]}
    small = torch.zeros(IMAGES["196 KB"], dtype=torch.uint8)
    found["killed_call_answered_s"] = _killed(call, small)
    call(small, 0.0)
    found["second_worker_s"] = _second(call, small)
    return found


def _timed(call: Call, images: torch.Tensor) -> float:
    started = time.perf_counter()
    call(images, 0.0)
    return time.perf_counter() - started


def _killed(call: Call, images: torch.Tensor) -> float:
    """Seconds until a call of 0.5 s is answered whose only worker died in the middle, less those 0.5 s."""
    pid = call(images, 0.0)
    killer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    killer.start()
    started = time.perf_counter()
    assert call(images, 0.5) != pid
    return time.perf_counter() - started - 0.7


def _second(call: Call, images: torch.Tensor) -> float:
    """Seconds from the first of many calls until two processes have answered."""
    pids: set[int] = set()
    until = time.perf_counter() + 120
    started = time.perf_counter()

    def work() -> None:
        while len(pids) < 2 and time.perf_counter() < until:
            pids.add(call(images, 0.05))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started if len(pids) == 2 else float("nan")


if __name__ == "__main__":
    main()
