"""Ray runtime: the roles in actors, as two stateful groups and the pools."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.runtime.cluster import Cluster
from flashdmd_ray.runtime.concurrency import in_thread, run_parallel
from flashdmd_ray.runtime.placement import WorkerGroup, check_placement
from flashdmd_ray.runtime.pools import Pool
from flashdmd_ray.runtime.protocol import ScalablePool, Task
from flashdmd_ray.runtime.wire import put_weights, register_tensors
from flashdmd_ray.runtime.workers import RoleHandle, StatefulGroup

T = TypeVar("T")


class RayRuntime:
    """Runtime over Ray actors. Use `build_runtime`, which prepares the process before Ray is imported."""

    def __init__(self, groups: Sequence[WorkerGroup], say: Callable[[str], None]) -> None:
        """Start or join a cluster, then start all workers at once, and wait until every role is loaded.

        Raises ValueError for an impossible placement or what a role's constructor raises, WorkerError when workers do
        not come up. Nothing is left running then. Call from the main thread: a private cluster ends with the thread
        that started it.
        """
        self.step: int | None = None
        self._groups: dict[str, StatefulGroup | Pool] = {}
        started = time.monotonic()
        workers = ", ".join(f"{group.workers} {group.name}" for group in groups)
        say("starting Ray")
        self._cluster = Cluster.join()
        try:
            check_placement(groups, self._cluster.nodes())
            say(f"starting workers: {workers} ({time.monotonic() - started:.0f} s)")
            register_tensors()
            for group in groups:
                self._groups[group.name] = self._start(group, groups)
            run_parallel([functools.partial(self._setup, name, say, started) for name in self._groups])
        except BaseException:
            self.close()
            raise
        handles = {
            role: RoleHandle(self._groups[group.name], role)
            for group in groups
            for role in group.roles
            if role != "rewards"
        }
        self.generator: Any = handles.get("generator")
        self.score: Any = handles.get("score")
        self.discriminator: Any = handles.get("discriminator")
        self.rollouts: Any = handles.get("rollouts")
        self.pools: Mapping[str, ScalablePool] = {n: pool for n, pool in self._groups.items() if isinstance(pool, Pool)}
        self.rewards: Mapping[str, Any] = {
            g.name: RoleHandle(self._groups[g.name], "rewards") for g in groups if "rewards" in g.roles
        }

    def _start(self, group: WorkerGroup, groups: Sequence[WorkerGroup]) -> StatefulGroup | Pool:
        if group.stateful:
            return StatefulGroup(group, lambda: self.step)

        def check_size(workers: int) -> None:
            sizes = {name: pool.size for name, pool in self._groups.items() if isinstance(pool, Pool)}
            sizes[group.name] = workers
            resized = [dataclasses.replace(g, workers=sizes.get(g.name, g.workers)) for g in groups]
            check_placement(resized, self._cluster.nodes())

        return Pool(group, lambda: self.step, check_size)

    def _setup(self, name: str, say: Callable[[str], None], started: float) -> None:
        self._groups[name].setup()
        say(f"{name} is ready ({time.monotonic() - started:.0f} s)")

    def publish(self, weights: Mapping[str, Tensor], version: int) -> PublishedWeights:
        """Put one copy in the object store, which workers read in place. It is kept as long as the returned object lives."""
        return PublishedWeights(version=version, tensors=put_weights(weights), checksum=checksum(weights))

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return run_parallel(calls)

    def background(self, call: Callable[[], T]) -> Task[T]:
        return in_thread(call)

    def pool_metrics(self) -> dict[str, float]:
        pools = {name: group for name, group in self._groups.items() if isinstance(group, Pool)}
        return {f"pool/{name}/{key}": value for name, pool in pools.items() for key, value in pool.figures().items()}

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups = {}
        self._cluster.leave()
