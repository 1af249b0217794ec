"""Cost of a joint training step at full size, by method of each role: seconds, operations, share of the matmul peak, peak memory.

Part of benchmarks/learner_step.py (--preset sdxl, or tiny for the same code on a CPU). Every figure comes from the real driver and roles on
the local runtime, with the configuration of the preset sdxl_lora_80gb and random weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from random_models import write_models
from torch.utils.flop_counter import FlopCounterMode

from flashdmd_ray import plan
from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data import build_images
from flashdmd_ray.demo import weights_path
from flashdmd_ray.driver import train
from flashdmd_ray.runtime.build import build_runtime

UNET_ROLES = ("generator", "score")
"""Roles whose methods count as the U-Net's part. Encoding prompts is in it, and little."""
MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}


@dataclass
class Verb:
    """Totals over all calls of one method of a role."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    peak_bytes: int = 0


@dataclass
class Meter:
    """counting: operations are counted, which takes time, so seconds are not."""

    device: torch.device
    verbs: dict[str, Verb] = field(default_factory=dict)
    counting: bool = False

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        verb = self.verbs.setdefault(name, Verb())
        if self.counting:
            with FlopCounterMode(display=False) as counter:
                result = call()
            verb.flops += counter.get_total_flops()
            return result
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        started = time.perf_counter()
        result = call()
        self.wait()
        verb.seconds += time.perf_counter() - started
        verb.calls += 1
        if self.device.type == "cuda":
            verb.peak_bytes = max(verb.peak_bytes, torch.cuda.max_memory_allocated())
        return result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Metered:
    """A role whose every call is measured."""

    def __init__(self, name: str, role: Any, meter: Meter) -> None:
        self._name, self.role, self._meter = name, role, meter

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        here = tuple(value.role if isinstance(value, Metered) else value for value in args)
        return self._meter.measure(f"{self._name}.{method}", partial(getattr(self.role, method), *here, **kwargs))


class Steps:
    """Tells the driver which steps to make."""

    preference_rate = 1.0

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = numbers

    def steps(self) -> Iterable[int]:
        return self._numbers

    def finish(self, step: int, metrics: Metrics) -> None:
        """Nothing is kept."""


def measure_full_size(preset: str, random: bool, steps: int, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """random: with random weights. Raises ValueError for a preset that needs a GPU where torch sees none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if preset == "sdxl" and device.type == "cpu":
        raise ValueError("--preset sdxl needs a GPU and torch sees none; --preset tiny runs the same code on a CPU")
    if preset == "tiny" and not random:
        raise ValueError("--preset tiny has no models but random ones: add --random-weights")
    with TemporaryDirectory() as name:
        changes = settings(preset, device)
        if random:
            changes |= write_models(preset, Path(name), device) | {"data.source": "demo"}
        config = load_config("sdxl_lora_80gb", [*map(override, changes.items()), *overrides])
        meter = Meter(device)
        seconds = run(config, meter, steps)
        planned = plan.parts_of(config) if device.type == "cuda" else []
    return report(preset, config, meter, seconds, planned)


def settings(preset: str, device: torch.device) -> dict[str, Any]:
    """Changes to the recipe: every step has all its preference updates; what the tiny preset and a CPU need."""
    changes: dict[str, Any] = {"preference.threshold": 0.0, "preference.start_step": 0}
    if preset == "tiny":
        rewards = [{"kind": "pickscore", "path": str(weights_path("reward"))}]
        changes |= {"model.sam": str(weights_path("sam")), "rewards": rewards, "lora.rank": 4, "placement.threads": 1}
    if device.type == "cpu":
        groups = ("learner", "discriminator", "rollout", "reward")
        changes |= {f"placement.{group}.gpus": 0 for group in groups}
        changes |= {"model.dtype": "float32", "engine.precision": "float32"}
    return changes


def override(change: tuple[str, Any]) -> str:
    return f"{change[0]}={json.dumps(change[1])}"


def run(config: Config, meter: Meter, steps: int) -> float:
    """Seconds of a step: one step to warm up, `steps` that are timed, and the same again to count their operations."""
    runtime, data = build_runtime(config), build_images(config.data, config.seed)
    for name in ("generator", "score", "discriminator", "rollouts"):
        setattr(runtime, name, Metered(name, getattr(runtime, name), meter))
    runtime.rewards = {pool: Metered(pool, role, meter) for pool, role in runtime.rewards.items()}
    train(config, runtime, data, Steps([0]))
    meter.verbs.clear()
    meter.wait()
    started = time.perf_counter()
    train(config, runtime, data, Steps(range(1, 1 + steps)))
    meter.wait()
    seconds = (time.perf_counter() - started) / steps
    meter.counting = True
    train(config, runtime, data, Steps(range(1, 1 + steps)))
    return seconds


def matmul_peak(device: torch.device) -> float:
    """Operations per second of large matrix products, the best of five."""
    size, dtype = MATMUL[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    meter, best = Meter(device), float("inf")
    for _ in range(5):
        verb = meter.verbs["matmul"] = Verb()
        meter.measure("matmul", lambda: [a @ b for _ in range(10)])
        best = min(best, verb.seconds)
    return 10 * 2 * size**3 / best


def report(preset: str, config: Config, meter: Meter, seconds: float, planned: Iterable[plan.Part]) -> dict[str, Any]:
    peak = matmul_peak(meter.device)

    def figures(verbs: Iterable[Verb]) -> dict[str, float]:
        chosen = list(verbs)
        spent, flops = sum(verb.seconds for verb in chosen), sum(verb.flops for verb in chosen)
        memory = max((verb.peak_bytes for verb in chosen), default=0)
        return {
            "calls": sum(verb.calls for verb in chosen),
            "seconds": spent,
            "tflop": flops / 1e12,
            "tflop_per_s": flops / spent / 1e12,
            "share_of_peak": flops / spent / peak,
            "peak_gib": memory / 2**30,
        }

    roles = {name.split(".")[0] for name in meter.verbs}
    return {
        "preset": preset,
        "device": torch.cuda.get_device_name() if meter.device.type == "cuda" else "cpu",
        "batch": config.batch,
        "seconds_per_step": seconds,
        "matmul_peak_tflop_per_s": peak / 1e12,
        "unet_part": figures(v for name, v in meter.verbs.items() if name.split(".")[0] in UNET_ROLES),
        "all": figures(meter.verbs.values()),
        "roles": {
            role: figures(v for n, v in meter.verbs.items() if n.split(".")[0] == role) for role in sorted(roles)
        },
        "verbs": {name: figures([verb]) for name, verb in meter.verbs.items()},
        "planned_gib_held": {part.name: part.held.device / 2**30 for part in planned if part.held is not None},
    }


def show(found: Mapping[str, Any]) -> None:
    """Print a report as a table."""
    print(
        f"{found['preset']} on {found['device']}, batch {found['batch']}: {found['seconds_per_step']:.3f} s per step; "
        f"matmul peak {found['matmul_peak_tflop_per_s']:.2f} TFLOP/s"
    )
    rows = {"U-Net part": found["unet_part"], **found["roles"], **found["verbs"], "all": found["all"]}
    print(f"{'':28s} {'calls':>6s} {'s':>9s} {'TFLOP':>10s} {'TFLOP/s':>9s} {'of peak':>8s} {'peak GiB':>9s}")
    for name, row in rows.items():
        memory = f"{row['peak_gib']:9.2f}" if row["peak_gib"] else f"{'-':>9s}"
        print(
            f"{name:28s} {row['calls']:6d} {row['seconds']:9.3f} {row['tflop']:10.3f} {row['tflop_per_s']:9.3f} "
            f"{row['share_of_peak']:8.1%} {memory}"
        )
