"""Measure how well rollouts and rewards overlap with distillation: `python benchmarks/overlap.py [--steps N] [--out FILE]`.

The real driver over simulated costs, on Ray: 1.0 s of learner, 0.4 s of rollouts on one worker and 1.5 s of rewards over 4 workers
in a step of five preference updates. Then the same calls one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])  # the workers import the roles too

UPDATES, WORKERS = 5, 4
LEARNER_S, ROLLOUT_S, REWARD_S = 1.0, 0.4, 1.5
LONGEST_S = max(LEARNER_S, ROLLOUT_S, REWARD_S / WORKERS)
COSTS = dict.fromkeys(("generate", "gradient", "update", "score"), LEARNER_S / 5) | {
    "preference": LEARNER_S / 5 / UPDATES,
    "rollout": ROLLOUT_S / UPDATES,
    "reward": REWARD_S / UPDATES,
}


class Timed:
    """Run of a fixed number of steps that records when each ended."""

    preference_rate = 1.0

    def __init__(self, steps: int) -> None:
        self.count = steps
        self.ends: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def steps(self) -> Iterable[int]:
        return range(self.count)

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        self.ends.append(time.perf_counter())
        self.metrics.append(metrics)

    def step_s(self) -> float:
        """Median seconds of a step, without the first."""
        return statistics.median(after - before for before, after in zip(self.ends, self.ends[1:], strict=False))


class OneAfterTheOther:
    """Runtime whose calls wait for each other."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return [call() for call in calls]

    def background(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call())
        return future


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    from simulated_roles import ROLES, NoData

    from flashdmd_ray.config import parse_config
    from flashdmd_ray.driver import train
    from flashdmd_ray.runtime import build_runtime

    config = parse_config(
        {
            "rewards": [{"kind": "pickscore", "name": "slow", "path": json.dumps(COSTS)}],
            "preference": {"updates": UPDATES},
            "placement": {"reward": {"workers": WORKERS}},
            "monitor": {"enabled": False},  # its probe is one more update's worth of pools' work
        }
    )
    runtime = build_runtime(config, ROLES)
    try:
        beside, apart = Timed(options.steps), Timed(max(3, options.steps // 3))
        train(config, runtime, NoData(), beside)  # type: ignore[arg-type]
        train(config, OneAfterTheOther(runtime), NoData(), apart)  # type: ignore[arg-type]
    finally:
        runtime.close()
    found = {
        "longest_resource_s": LONGEST_S,
        "step_s": beside.step_s(),
        "of_longest": beside.step_s() / LONGEST_S,
        "one_after_the_other_s": apart.step_s(),
        "times_faster": apart.step_s() / beside.step_s(),
        "busy": {
            name: value for name, value in beside.metrics[-1].items() if name.startswith("pool/") and "busy" in name
        },
    }
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
