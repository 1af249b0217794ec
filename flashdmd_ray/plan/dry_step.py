"""A mean step, by running it: the driver's own loop and the real roles, on networks that only have prices.

Networks are priced by architecture (`costs`): one step of SDXL calls a million operations, which would take minutes even without values.
Everything between the networks is the code of a real run: which calls are made, on how many samples, what waits for what and which
tensors live meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashdmd_ray.batch import Batch, Metrics, Prompts, PublishedWeights, map_tensors
from flashdmd_ray.config import Config
from flashdmd_ray.driver import train
from flashdmd_ray.plan.clock import Clock, ClockTask
from flashdmd_ray.plan.dry_roles import Prices, build_roles, prices_of
from flashdmd_ray.plan.dry_tensors import DryTensors, without_values
from flashdmd_ray.plan.hardware import Gpu
from flashdmd_ray.plan.measure.observe import LiveMemory
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.parts import published_bytes
from flashdmd_ray.plan.speed import STORE, Call, seconds_of
from flashdmd_ray.plan.stand_ins import PricedImages
from flashdmd_ray.plan.works import RoleTime, Step, Timing, Work
from flashdmd_ray.runtime.shards import SAMPLES, is_large, join_results, split_arguments

T = TypeVar("T")

SHEET = 10
"""Prompts of a sample sheet."""


def dry_step(config: Config, models: Models, gpu: Gpu | None, repeats: int) -> Step | None:
    """See `mean_step.step_of`."""
    prices = prices_of(config, models)
    if prices is None:
        return None
    ledger = Ledger()
    run = DryRun(config, ledger, repeats)
    with DryTensors():
        runtime = DryRuntime(config, models, prices, ledger, gpu)
        images = PricedImages(prices.latent, config.data.latents is not None)
        train(config, runtime, images, run)  # type: ignore[arg-type]
        ledger.counts = False
        ranks = config.placement.learner.workers
        count = -(-SHEET // ranks) * ranks
        sheet = Prompts(tuple(str(number) for number in range(count)), torch.arange(count))
        runtime.generator.generate_images(sheet, config.sampling.timesteps, 0)
    return run.mean(runtime.peaks(), published_bytes(config, models))


@dataclass
class Ledger:
    """Takes down what networks spend, by part and by the call in hand."""

    flops: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    peaks: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    clock: Clock = field(default_factory=Clock)
    call: Call = field(default_factory=Call)
    group: str = ""
    share: float = 1.0
    counts: bool = True

    def spend(self, part: str, precision: str, flops: float, launches: float, peak: float) -> None:
        """A network's call, see `Spend`."""
        key = self.group, part
        self.peaks[key] = max(self.peaks[key], peak)
        if self.counts:
            self.flops[key] += flops * self.share
            self.call.add(flops, launches, precision)

    def update(self, parameters: float) -> None:
        """An optimizer's update."""
        self.call.updated += parameters


class DryRun:
    """A run of few steps that stand for all: with preference updates, with a probe beside them, and without."""

    preference_rate = 1.0

    def __init__(self, config: Config, ledger: Ledger, repeats: int) -> None:
        self._ledger = ledger
        self._kinds = list(_kinds(config, repeats))
        self._weight = 0.0
        self._start = config.preference.start_step if config.preference.updates else 0
        self._before: list[float] = []
        self._flops: dict[tuple[str, str], float] = defaultdict(float)
        self._early: dict[tuple[str, str], float] = defaultdict(float)
        self._seconds = 0.0
        self._busy: dict[str, float] = defaultdict(float)
        self._times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._critical: dict[str, float] = defaultdict(float)

    def steps(self) -> Iterator[int]:
        for step, weight in self._kinds:
            self._weight = weight
            self._ledger.flops.clear()
            self._ledger.clock.start()
            yield step

    def finish(self, step: int, metrics: Metrics) -> None:
        """Add the step's figures to the mean."""
        clock, weight = self._ledger.clock, self._weight
        if step < self._start:
            self._before.append(clock.now.time)
            for key, flops in self._ledger.flops.items():
                self._early[key] += flops
        for key, flops in self._ledger.flops.items():
            self._flops[key] += weight * flops
        self._seconds += weight * clock.now.time
        for group, seconds in clock.busy.items():
            self._busy[group] += weight * seconds
        for call, seconds in clock.critical().items():
            self._critical[call] += weight * seconds
        for named, each in clock.seconds.items():
            self._times[named][0] += weight * len(each)
            self._times[named][1] += weight * sum(each)

    def mean(self, peaks: Mapping[str, float], published: float) -> Step:
        keys = dict.fromkeys([*self._flops, *self._ledger.peaks])
        early = max(1, len(self._before))
        works = [
            Work(
                part, group, self._flops[group, part], self._ledger.peaks[group, part], self._early[group, part] / early
            )
            for group, part in keys
        ]
        times = [RoleTime(group, call, calls, seconds) for (group, call), (calls, seconds) in self._times.items()]
        busy = {group: seconds / self._seconds for group, seconds in self._busy.items()} if self._seconds else {}
        critical = sorted(self._critical.items(), key=lambda item: -item[1])
        before = sum(self._before) / len(self._before) if self._before else 0.0
        timing = Timing(self._seconds, before, times, busy, critical) if self._seconds else None
        return Step(works, peaks, timing, published)


def _kinds(config: Config, repeats: int) -> Iterator[tuple[int, float]]:
    """Steps to run, each with its share of a mean step. With preference updates that is one of those from their start on."""
    preference = config.preference
    if not preference.updates:
        yield from ((step, 1 / repeats) for step in range(repeats))
        return
    every, start = preference.every, preference.start_step
    probes = config.monitor.every if config.monitor_enabled else 0
    with_probe = [start + every * probes * k for k in range(1, repeats + 1)] if probes else []
    plain = [start + every * k for k in range(1, 2 * repeats + 2) if not probes or k % probes][:repeats]
    shares = [(with_probe, 1 / (every * probes) if probes else 0.0)]
    shares.append((plain, 1 / every - shares[0][1]))
    if every > 1:
        shares.append(([start + every * k + 1 for k in range(repeats)], 1 - 1 / every))
    chosen = {step: share / len(steps) for steps, share in shares for step in steps if share > 0}
    chosen |= dict.fromkeys(range(min(start, repeats)), 0.0)  # distillation alone
    chosen[start] = 0.0  # the reference policy is frozen and the rewards' ranking is checked there, once in a run
    yield from sorted(chosen.items())


class DryRuntime:
    """A `Runtime` of one rank of each group: it makes the calls that this rank would get, and keeps the time of all."""

    def __init__(self, config: Config, models: Models, prices: Prices, ledger: Ledger, gpu: Gpu | None) -> None:
        self.config, self.ledger, self.gpu = config, ledger, gpu
        self.step: int | None = None
        self._memories: dict[str, LiveMemory] = {}
        roles = build_roles(config, models, prices, ledger.spend, ledger.update)
        handles = {name: Handle(self, group, role) for group, found in roles.items() for name, role in found.items()}
        self.generator: Any = handles["generator"]
        self.score: Any = handles["score"]
        self.discriminator: Any = handles["discriminator"]
        self.rollouts: Any = handles.get("rollouts")
        self.rewards = {
            pool: handles[f"rewards/{pool}"] for pool in config.reward_pools if f"rewards/{pool}" in handles
        }
        self._published = published_bytes(config, models)

    def publish(self, version: int) -> ClockTask[PublishedWeights]:
        """Only takes the learner's time, where weights have to travel."""
        return self.background(lambda: self._publish(version))

    def _publish(self, version: int) -> PublishedWeights:
        if self._published:
            seconds = seconds_of(Call(carried=self._published), self.config, "learner", self.gpu)
            self.ledger.clock.work(self.config.process("learner"), 1, "publish", seconds)
        return PublishedWeights(version, {}, str(version))

    def fetch(self, value: T) -> T:
        if self.gpu is not None and self.config.runtime == "ray":
            self.ledger.clock.spend("driver: fetch", _size(value) / STORE)
        return value

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return self.ledger.clock.parallel(*calls)

    def background(self, call: Callable[[], T]) -> ClockTask[T]:
        return self.ledger.clock.background(call)

    def pool_metrics(self) -> dict[str, float]:
        return {}

    @contextmanager
    def inside(self, group: str) -> Iterator[None]:
        """Tensors made here live in a process of the group."""
        with self._memories.setdefault(self.config.process(group), LiveMemory()):
            yield

    def peaks(self) -> dict[str, float]:
        """The most bytes of activations in each kind of process."""
        return {process: float(memory.peak) for process, memory in self._memories.items()}


class Handle:
    """A role of one rank, or of one member of a pool, called as the whole group is."""

    def __init__(self, runtime: DryRuntime, group: str, role: Any) -> None:
        self.role = role
        self._runtime, self._group = runtime, group
        self._ranks = group == "discriminator" or runtime.config.beside_learner(group)
        self._workers = runtime.config.placement.of(group).workers

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            ranks = self._workers if self._ranks else 1
            shards, sizes = split_arguments(tuple(_role_of(value) for value in args), kwargs, ranks)
            result = self._call(method, *shards[0])
            return join_results([result] * ranks, sizes)

        return call

    def _call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        runtime, ledger = self._runtime, self._runtime.ledger
        ledger.group, ledger.call = self._group, Call(ranks=self._workers if self._ranks else 1)
        ledger.share = 1.0 if self._ranks else 1 / self._workers
        with runtime.inside(self._group):
            result = getattr(self.role, method)(*map_tensors(args, _copied), **map_tensors(kwargs, _copied))
        samples = [value for value in args if isinstance(value, Batch)] + [result] * (method in SAMPLES)
        ledger.call.stored = _size(samples, is_large)
        ledger.call.carried += _size(args) + _size(result) - ledger.call.stored
        result = map_tensors(result, _scores if method == "score" else _copied)
        if ledger.counts:
            seconds = seconds_of(ledger.call, runtime.config, self._group, runtime.gpu)
            workers = 1 if self._ranks else self._workers
            ledger.clock.work(runtime.config.process(self._group), workers, method, seconds)
        return result


def _role_of(value: Any) -> Any:
    return value.role if isinstance(value, Handle) else value


def _copied(tensor: Tensor) -> Tensor:
    """The value as it arrives in another process."""
    return torch.empty_like(tensor) if without_values(tensor) else tensor


def _scores(tensor: Tensor) -> Tensor:
    """Real scores, so that pairs can be chosen: the first candidate of a group is the best."""
    return -torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape)


def _size(value: Any, counts: Callable[[Tensor], bool] = lambda tensor: True) -> float:
    total = 0.0

    def add(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes if counts(tensor) else 0
        return tensor

    map_tensors(value, add)
    return total
