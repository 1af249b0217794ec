"""Measure Ray's overhead: the same calls and the same distillation step in worker processes and in this process, one rank each.

    python benchmarks/ray_overhead.py [--parts calls step publish] [--calls 200] [--seconds 150] [--batch 32] [--json FILE]

Calls go to a role that gives back what it gets, with what a call carries in the demo and at SDXL's size. The step is the demo's
distillation. "in turn" makes the calls of a step one after the other, as the local runtime does: the difference is what the way there and
back costs. "as it runs" lets independent calls overlap. A round makes the step in each way, the next round in the opposite order; ratios
are taken within a round, of seconds and of the CPU seconds of all processes together.

publish: a sixteenth of SDXL's weights (642 MB in float32) from a learner in bfloat16 to a rollout's network. As it is: the learner puts
them into the object store, the driver holds a reference. As it was: the driver fetches float32 from the learner and stores it again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rounds import Way, compare, describe, measure_rounds

from flashdmd_ray.batch import Latents, Prompts, PublishedWeights, StepRng
from flashdmd_ray.config import EngineConfig, OptimizerConfig, load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import distil
from flashdmd_ray.runtime import Runtime, build_runtime

WEIGHTS, LAYER = 160_466_480, 1_604_664
"""Parameters that are published, a sixteenth of SDXL's, and of one layer."""
PAYLOADS = {"nothing": None, "demo, 32 x (4, 8, 8)": (32, 4, 8, 8), "SDXL, 8 x (4, 128, 128)": (8, 4, 128, 128)}


class Echo:
    """A role without work."""

    @classmethod
    def from_config(cls, config: Any, rank: int = 0, world_size: int = 1) -> Echo:
        return cls()

    def echo(self, value: Any) -> Any:
        return value


def network() -> torch.nn.Module:
    """WEIGHTS parameters in layers of SDXL's size."""
    return torch.nn.ParameterDict({f"layer {i}": torch.randn(LAYER) for i in range(WEIGHTS // LAYER)})


class Generator:
    """The generator of a learner in bfloat16, with its engine."""

    def __init__(self) -> None:
        from flashdmd_ray.engine import build_engine

        self.engine = build_engine(EngineConfig(precision="bfloat16"), network(), OptimizerConfig(), "generator")

    @classmethod
    def from_config(cls, config: Any, rank: int = 0, world_size: int = 1) -> Generator:
        return cls()

    def live_weights(self) -> dict[str, torch.Tensor]:
        return self.engine.live_weights()

    def float_weights(self) -> dict[str, torch.Tensor]:
        return self.engine.weights()


class Rollout:
    """The network of a rollout."""

    def __init__(self) -> None:
        self.tensors = network().bfloat16().state_dict()

    @classmethod
    def from_config(cls, config: Any, rank: int = 0, world_size: int = 1) -> Rollout:
        return cls()

    def load(self, weights: PublishedWeights) -> float:
        """Take over the weights; returns one of them."""
        for name, tensor in self.tensors.items():
            tensor.copy_(weights.tensors[name])
        return float(self.tensors["layer 0"][0])


class InTurn:
    """A runtime whose parallel calls run one after the other."""

    def __init__(self, runtime: Runtime) -> None:
        self.generator, self.score, self.discriminator = runtime.generator, runtime.score, runtime.discriminator

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return [call() for call in calls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="for the step: as many rounds as fit, three at least"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--parts", nargs="+", choices=["calls", "step", "publish"], default=["calls", "step", "publish"]
    )
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if "calls" in options.parts:
        found["calls"] = measure_calls(options.calls)
        for name, taken in found["calls"].items():
            print(f"a call with {name:26s} {taken} ms (median, 90th percentile)")
    if "step" in options.parts:
        found["step"] = measure_step(options.seconds, options.batch)
        for name, figures in found["step"].items():
            print(f"step, {name:16s} {describe(figures)}")
    if "publish" in options.parts:
        found["publish"] = measure_publishing(options.seconds)
        print(f"publishing, as it is against as it was: {describe(found['publish'])}")
        for name, peak in found["publish"]["driver_mib"].items():
            print(f"publishing, {name}: the driver's own memory grows by {peak:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def measure_publishing(seconds: float) -> dict[str, Any]:
    """Seconds of a publication, from the learner's weights to the rollout's network, and how far each way makes the driver grow."""
    roles = {"learner": {"generator": "ray_overhead:Generator"}, "rollout": {"rollouts": "ray_overhead:Rollout"}}
    # Nothing overlaps in a round: the store must hold one version in float32, and one on its way.
    runtime: Any = build_runtime(load_config(None, ["runtime=ray"]), roles)
    from flashdmd_ray.runtime.wire import published  # imports ray, which reads its settings then

    def as_it_is(number: int) -> object:
        return runtime.rollouts.load(runtime.publish(number).result())

    def as_it_was(number: int) -> object:
        return runtime.rollouts.load(published(runtime.generator.float_weights(), number))

    ways: dict[str, Way] = {"as it is": as_it_is, "as it was": as_it_was}
    try:
        if as_it_is(0) != as_it_was(0):
            raise RuntimeError("the two ways bring other weights")
        grown = {name: growth_mib(way) for name, way in ways.items()}
        rounds = measure_rounds(ways, seconds, cpu_seconds)
    finally:
        runtime.close()
    return compare(rounds, *ways) | {"rounds": len(rounds), "driver_mib": grown}


def growth_mib(way: Way) -> float:
    """MiB by which this process's anonymous memory grows at most during a call."""
    before, most, done = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, anonymous_mib() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    way(0)
    done.set()
    watcher.join()
    return most


def anonymous_mib() -> float:
    """Memory of this process that no file and no shared object backs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 2**10


def measure_calls(calls: int) -> dict[str, str]:
    """Milliseconds that a call takes longer through Ray than in this process: median and 90th percentile."""
    runtime = build_runtime(load_config(None, ["runtime=ray"]), {"learner": {"generator": "ray_overhead:Echo"}})
    try:
        return {name: overhead(runtime.generator, payload(shape), calls) for name, shape in PAYLOADS.items()}
    finally:
        runtime.close()


def payload(shape: tuple[int, ...] | None) -> Latents | None:
    if shape is None:
        return None
    texts = ("a red 4 left of a green 7 on a gray background",) * shape[0]
    return Latents(torch.randn(shape), Prompts(texts, torch.arange(shape[0])))


def overhead(role: Any, value: Any, calls: int) -> str:
    here, taken = Echo(), []
    for number in range(calls + 10):
        started = time.perf_counter()
        role.echo(value)
        between = time.perf_counter()
        here.echo(value)
        if number >= 10:
            taken.append(1000 * (2 * between - started - time.perf_counter()))
    cuts = statistics.quantiles(taken, n=10)
    return f"{statistics.median(taken):.2f}, {cuts[-1]:.2f}"


def measure_step(seconds: float, batch: int) -> dict[str, dict[str, object]]:
    """Seconds of a distillation step on Ray against the local runtime, as `compare` gives them."""
    settings = ["preference.updates=0", "evaluation.ema=0", f"batch={batch}"]
    config = load_config(None, ["runtime=local", *settings])
    local, on_ray = build_runtime(config), build_runtime(load_config(None, ["runtime=ray", *settings]))
    try:
        data = build_images(config.data, config.seed)

        def step_of(runtime: Any) -> Way:
            return lambda number: distil(config, runtime, data, StepRng(config.seed, number))

        ways = {"local": step_of(local), "ray, in turn": step_of(InTurn(on_ray)), "ray, as it runs": step_of(on_ray)}
        rounds = measure_rounds(ways, seconds, cpu_seconds)
    finally:
        on_ray.close()
    return {way: compare(rounds, way, "local") for way in ways if way != "local"}


def cpu_seconds() -> float:
    """User and system seconds of this process and everything it started."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
