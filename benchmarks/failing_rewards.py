"""Reward pools whose workers fail all the time: `python benchmarks/failing_rewards.py [--seconds N] [--out FILE]`.

The real driver and real pools over roles that do nothing, while a reward worker is killed every second, 5 % of the reward calls raise,
2 % give nan and 2 % hang past their deadline. The run must complete, and every group that was asked for must be scored or counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])  # the workers import the roles too

TROUBLE = {"raises": 0.05, "nan": 0.02, "hangs": 0.02, "hang": 30.0, "reward": 0.02}
DEADLINE_S = 2.0
UPDATES, GROUPS, GROUPS_PER_CALL, WORKERS = 3, 8, 2, 4


class ForSeconds:
    """Run that adds up the driver's counts, until the time is up and all counts of `meet` are above 0, or for ten times the time."""

    preference_rate = 1.0

    def __init__(self, seconds: float, meet: Collection[str] = ()) -> None:
        self.started = time.monotonic()
        self.seconds = seconds
        self.meet = meet
        self.totals: dict[str, float] = {}
        self.done = 0

    def steps(self) -> Iterable[int]:
        while (passed := time.monotonic() - self.started) < 10 * self.seconds:
            if passed > self.seconds and all(self.totals[name] > 0 for name in self.meet):
                return
            yield self.done

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        self.done += 1
        for name, value in metrics.items():
            self.totals[name] = self.totals.get(name, 0.0) + value


class Killer:
    """Ends a process of the folder every second, at random; those that start meanwhile too."""

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder = folder
        self.every_s = every_s
        self.killed = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Killer:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.thread.join()

    def _work(self) -> None:
        chance = random.Random(0)
        while not self.stop.wait(self.every_s):
            pids = [int(path.name) for path in self.folder.iterdir()]
            chance.shuffle(pids)
            for pid in pids:
                (self.folder / str(pid)).unlink()
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed += 1
                    break


def chaos(seconds: float, every_s: float = 1.0, workers: int = WORKERS, meet: Collection[str] = ()) -> dict[str, float]:
    """Run it; returns what was asked, scored, dropped and killed. Raises AssertionError when the counts do not add up."""
    from simulated_roles import ROLES, NoData

    from flashdmd_ray.config import parse_config
    from flashdmd_ray.driver import train
    from flashdmd_ray.runtime import build_runtime
    from flashdmd_ray.scoring import REASONS

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "rewards": [{"kind": "pickscore", "name": "shaky", "path": json.dumps(TROUBLE | {"folder": folder})}],
            "preference": {"updates": UPDATES, "batch": GROUPS, "threshold": 0.0, "max_unscored": 1000},
            "placement": {"reward": {"workers": workers, "groups_per_call": GROUPS_PER_CALL}},
            "monitor": {"enabled": False},
            "deadlines": {"reward_s": DEADLINE_S, "retries": 1},
        }
        config = parse_config(settings)
        runtime = build_runtime(config, ROLES)
        try:
            run = ForSeconds(seconds, meet)
            with Killer(Path(folder), every_s) as killer:
                train(config, runtime, NoData(), run)  # type: ignore[arg-type]
            used = runtime.generator.pairs_used()
        finally:
            runtime.close()
    return (
        accounted(run, used)
        | {"killed": killer.killed, "steps": run.done}
        | {r: run.totals[f"dropped/{r}"] for r in REASONS}
    )


def accounted(run: ForSeconds, used: int) -> dict[str, float]:
    from flashdmd_ray.scoring import REASONS

    totals: dict[str, Any] = run.totals
    asked, scored, pairs = (totals[f"preference/{name}"] for name in ("groups", "scored", "pairs"))
    dropped = sum(totals[f"dropped/{reason}"] for reason in REASONS)
    assert asked == run.done * UPDATES * GROUPS, f"{asked} groups counted in {run.done} steps"
    assert asked == scored + dropped, f"{asked} asked for, {scored} scored, {dropped} dropped"
    assert pairs == used <= scored, f"{pairs} pairs counted, {used} learnt from, {scored} scored"
    return {"asked": asked, "scored": scored, "pairs": pairs, "replayed_groups": totals["pool/shaky/replayed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="write the figures as JSON too")
    options = parser.parse_args()
    found = chaos(options.seconds)
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
