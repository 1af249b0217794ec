"""Measure how long a checkpoint holds up training, synchronous and asynchronous by turns, with the demo's networks.

    python benchmarks/checkpoint_stall.py [--pairs 10] [--runtime local] [--dir DIRECTORY-OR-URL] [--set key=value ...]

Every other step saves. stall: seconds until `save` returns to the training thread. stall and next step: with the step that follows, which
shares the machine with the writer, less the median of a step without. Medians over the pairs; quartiles in brackets. Figures of a busy
machine mean little, so one is refused unless told --busy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable

from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import manifests, open_store
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.run.storage import Location, parse_location
from flashdmd_ray.runtime import Runtime, build_runtime
from flashdmd_ray.training.checkpoint_saver import CheckpointSaver

WARM_UP = 3
"""Steps before anything is measured; the first moments are made there."""


class Measured:
    """Run that alternates plain steps with steps that are followed by a save, the kinds of save taking turns."""

    preference_rate = 1.0

    def __init__(self, config: Config, runtime: Runtime, root: Location, pairs: int) -> None:
        roles = (runtime.generator, runtime.score, runtime.discriminator)
        store = open_store(root, "benchmark", keep=1)
        self.savers = {kind: CheckpointSaver(store, roles, kind == "asynchronous", 600.0) for kind in KINDS}
        self.steps_to_do = WARM_UP + 4 * pairs + 1
        self.stalls: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.following: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.plain: list[float] = []
        self._saved: str | None = None
        self._started = time.perf_counter()

    def steps(self) -> Iterable[int]:
        return range(self.steps_to_do)

    def finish(self, step: int, metrics: Metrics) -> None:
        seconds = time.perf_counter() - self._started
        if self._saved is not None:
            self.following[self._saved].append(seconds)
            self.savers[self._saved].wait()
            self._saved = None
        elif step >= WARM_UP:
            self.plain.append(seconds)
        if step >= WARM_UP and (step - WARM_UP) % 2 == 0 and step < self.steps_to_do - 1:
            number = (step - WARM_UP) // 2
            self._saved = KINDS[(number + number // 2) % 2]  # each pair in the other order than the one before
            begun = time.perf_counter()
            self.savers[self._saved].save(step, {"step": step}, {})
            self.stalls[self._saved].append(time.perf_counter() - begun)
        self._started = time.perf_counter()


KINDS = ("synchronous", "asynchronous")


def main() -> None:
    options = parse()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    print(f"load {load:.1f} on {cores} cores before")
    if load > 0.5 * cores and not options.busy:
        sys.exit("the machine is busy: wait, or give --busy and trust the figures accordingly")
    demo = [f"runtime={options.runtime}", "batch=4", "preference.updates=1", "preference.batch=2"]
    config = load_config(None, [*demo, *options.set])
    with tempfile.TemporaryDirectory() as folder:
        root = parse_location(options.dir or folder) / f"stall-{uuid.uuid4().hex[:8]}"
        runtime = build_runtime(config)
        try:
            measured = Measured(config, runtime, root, options.pairs)
            train(config, runtime, build_images(config.data, config.seed), measured)
        finally:
            runtime.close()
        size = sum(part.bytes for part in manifests(root)[0].files.values())
    print(f"load {os.getloadavg()[0]:.1f} after; {size / 2**20:.1f} MiB to {options.dir or 'a local disk'}")
    print_table(measured)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="saves of each kind")
    parser.add_argument("--runtime", choices=["local", "ray"], default="local")
    parser.add_argument("--dir", help="where to save (default: a temporary folder)")
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine too")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="changes to the demo")
    return parser.parse_args()


def print_table(measured: Measured) -> None:
    plain = statistics.median(measured.plain)
    print(f"step without a save: {summary(measured.plain)}")
    for kind in KINDS:
        both = [a + b - plain for a, b in zip(measured.stalls[kind], measured.following[kind], strict=True)]
        print(f"{kind:>12}: stall {summary(measured.stalls[kind])}, stall and next step {summary(both)}")


def summary(seconds: list[float]) -> str:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle:.3f} s [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
