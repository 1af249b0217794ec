"""A joint training step of the real driver and roles in this process, by method of each role: calls, seconds, peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import Config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.runtime.build import build_runtime


@dataclass
class Verb:
    """Totals over all calls of one method of a role. peak: bytes of GPU memory."""

    calls: int = 0
    seconds: float = 0.0
    peak: int = 0


@dataclass
class Meter:
    """Seconds and memory of calls, by "role.method"."""

    device: torch.device
    verbs: dict[str, Verb] = field(default_factory=dict)

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        verb = self.verbs.setdefault(name, Verb())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.wait()
        started = time.perf_counter()
        result = call()
        self.wait()
        verb.seconds += time.perf_counter() - started
        verb.calls += 1
        if self.device.type == "cuda":
            verb.peak = max(verb.peak, torch.cuda.max_memory_allocated())
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


@dataclass(frozen=True)
class Measured:
    """seconds: of a step. peak, reserved: bytes of GPU memory at most, in tensors and in all; on a CPU the process's memory."""

    seconds: float
    peak: float
    reserved: float
    verbs: dict[str, Verb]


def measure_step(config: Config, device: torch.device, steps: int) -> Measured:
    """The mean of `steps` steps, after one to warm up."""
    runtime, data, meter = build_runtime(config), build_images(config.data, config.seed), Meter(device)
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
    if device.type == "cuda":
        peak, reserved = max(verb.peak for verb in meter.verbs.values()), torch.cuda.max_memory_reserved()
    else:
        peak = reserved = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(seconds, peak, reserved, meter.verbs)


def matmul_peak(device: torch.device) -> float:
    """Operations per second of large matrix products in bfloat16 (float32 on a CPU), the best of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    meter, best = Meter(device), float("inf")
    for _ in range(5):
        verb = meter.verbs["matmul"] = Verb()
        meter.measure("matmul", lambda: [a @ b for _ in range(10)])
        best = min(best, verb.seconds)
    return 10 * 2 * size**3 / best
