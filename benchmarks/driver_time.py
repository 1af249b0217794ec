"""Measure the driver's own time per step against the number of workers: `python benchmarks/driver_time.py [--steps N] [SIZE ...]`.

The real driver and runtime over roles that sleep, each size RANKSxWORKERS with so many learner ranks (gloo) and reward workers in processes
of their own; a step scores one prompt group on each reward worker. Counted are the CPU seconds of the driver's process, all threads of
Ray included, so other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])  # the workers import the roles too

from overlap import Timed  # noqa: E402
from simulated_roles import ROLES, NoData  # noqa: E402

from flashdmd_ray.config import parse_config  # noqa: E402
from flashdmd_ray.driver import train  # noqa: E402
from flashdmd_ray.runtime import build_runtime  # noqa: E402

COSTS = dict.fromkeys(("generate", "gradient", "update", "score"), 0.25) | {"rollout": 0.1, "reward": 0.5}


class Counted(Timed):
    """Notes the process's CPU seconds at the end of each step."""

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        super().finish(step, metrics)
        self.cpu = [*getattr(self, "cpu", []), time.process_time()]


def driver_seconds(ranks: int, workers: int, steps: int) -> float:
    config = parse_config(
        {
            "batch": 2 * ranks,
            "rewards": [{"kind": "pickscore", "name": "slow", "path": json.dumps(COSTS)}],
            "preference": {"updates": 1, "batch": workers, "candidates": 2},
            "placement": {"learner": {"workers": ranks}, "reward": {"workers": workers, "groups_per_call": 1}},
            "monitor": {"enabled": False},
        }
    )
    runtime = build_runtime(config, ROLES, say=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    try:
        run = Counted(steps + 1)
        train(config, runtime, NoData(), run)  # type: ignore[arg-type]
        return (run.cpu[-1] - run.cpu[0]) / steps
    finally:
        runtime.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=["1x1", "1x8", "1x16", "4x8", "8x8"], metavar="SIZE")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    options = parser.parse_args()
    for size in options.sizes:
        ranks, workers = map(int, size.split("x"))
        print(
            f"{ranks} ranks, {workers} reward workers: {1000 * driver_seconds(ranks, workers, options.steps):.1f} ms of CPU per step"
        )


if __name__ == "__main__":
    main()
