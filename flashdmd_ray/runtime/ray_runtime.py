"""Ray runtime: the roles in actors, as two stateful groups and the pools."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayError

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.run.progress import still
from flashdmd_ray.runtime.call_times import CallTimes
from flashdmd_ray.runtime.cluster import Cluster
from flashdmd_ray.runtime.concurrency import in_thread, run_parallel
from flashdmd_ray.runtime.errors import Call, TensorsLost
from flashdmd_ray.runtime.failures import reraise, translate
from flashdmd_ray.runtime.gang import Gang
from flashdmd_ray.runtime.handles import RoleHandle
from flashdmd_ray.runtime.placement import WorkerGroup, check_placement, check_shares, rewards_of
from flashdmd_ray.runtime.pools import Pool, PoolLease
from flashdmd_ray.runtime.protocol import ScalablePool, Task
from flashdmd_ray.runtime.wire import fetch_rows, register_tensors
from flashdmd_ray.runtime.workers import StatefulGroup

T = TypeVar("T")


class RayRuntime:
    """Runtime over Ray actors. Use `build_runtime`, which prepares the process before Ray is imported."""

    def __init__(
        self, groups: Sequence[WorkerGroup], say: Callable[[str], None], previous: RayRuntime | None = None
    ) -> None:
        """Start or join a cluster, then start all workers at once, and wait until every role is loaded.

        previous: the runtime of an attempt that failed, after `end_attempt`: its cluster and what is whole of its workers live on here.

        Raises NoRoom for a job that the cluster has no room for within `deadlines.start_s` (a private Ray says so at once), and leaves
        `previous` as it was; ValueError for an impossible placement or what a role's constructor raises, WorkerError when workers do not
        come up. Nothing is left running then. Call from the main thread: a private cluster ends with the thread that started it.
        """
        self._step: int | None = None
        self._deadlines = groups[0].config.deadlines
        self.times = CallTimes()
        self._groups: dict[str, StatefulGroup | Pool] = {}
        self._gang: Gang | None = None
        started = time.monotonic()
        workers = ", ".join(f"{group.workers} {group.name}" for group in groups)
        say("starting Ray" if previous is None else "starting anew what was lost")
        lives_on = previous if previous is not None and previous.is_alive else None
        with still(say, lambda: f"still starting Ray ({time.monotonic() - started:.0f} s)"):
            self._cluster = _cluster_after(previous)
        try:
            owner = lives_on or self
            owner._gang = owner._gang or _reserve(groups, self._cluster)
            owner._gang.wait(groups[0].config.deadlines.start_s, say)
        except BaseException:
            if lives_on is None:
                self.close()
            raise
        if lives_on is not None:
            self._gang, lives_on._gang = lives_on._gang, None
        try:
            say(f"starting workers: {workers} ({time.monotonic() - started:.0f} s)")
            register_tensors()
            whole = {} if previous is None else previous._hand_over(lambda: self.step)
            for group in groups:
                self._groups[group.name] = whole.get(group.name) or self._start(group)
            self.pools: Mapping[str, ScalablePool] = self._attach_pools(groups)
            self._wait_until_ready(say, started)
        except BaseException:
            self.close()
            raise
        self._leases = {name: PoolLease(pool) for name, pool in self._groups.items() if isinstance(pool, Pool)}
        roles = {role: self._handle(group.name, role) for group in groups for role in group.roles}
        self.generator: Any = roles.get("generator")
        self.score: Any = roles.get("score")
        self.discriminator: Any = roles.get("discriminator")
        self.rollouts: Any = roles.get("rollouts")
        self.rewards: Mapping[str, Any] = rewards_of(roles)

    @property
    def step(self) -> int | None:
        """See `Runtime.step`. Set to another one, it raises WorkerLost when the private Ray has lost a process."""
        return self._step

    @step.setter
    def step(self, step: int | None) -> None:
        self._step = step
        self._cluster.check(f"step {step}: ")

    def _attach_pools(self, groups: Sequence[WorkerGroup]) -> dict[str, Pool]:
        pools = {name: pool for name, pool in self._groups.items() if isinstance(pool, Pool)}

        def check_size(name: str, workers: int) -> None:
            sizes = {other: pool.size for other, pool in pools.items()} | {name: workers}
            resized = [dataclasses.replace(g, workers=sizes.get(g.name, g.workers)) for g in groups]
            check_placement(resized, self._cluster.nodes())

        for name, pool in pools.items():
            pool.attach(lambda: self.step, functools.partial(check_size, name), self._cluster.is_alive)
        return pools

    def _handle(self, name: str, role: str) -> RoleHandle:
        group = self._groups[name]
        owner = group if isinstance(group, StatefulGroup) else self._leases[name]
        return RoleHandle(owner, name, role, self.times)

    def _wait_until_ready(self, say: Callable[[str], None], started: float) -> None:
        loading = list(self._groups)

        def setup(name: str) -> None:
            self._groups[name].setup()
            loading.remove(name)
            say(f"{name} is ready ({time.monotonic() - started:.0f} s)")

        with still(say, lambda: f"loading models: {', '.join(loading)} ({time.monotonic() - started:.0f} s)"):
            run_parallel([functools.partial(setup, name) for name in self._groups])

    def publish(self, version: int) -> Task[PublishedWeights]:
        """The learner puts one copy into the object store, which workers read in place. It is kept as long as the result lives."""
        learner = self._groups["learner"]
        assert isinstance(learner, StatefulGroup)
        if learner.has("rollouts"):
            return in_thread(lambda: PublishedWeights(version, {}, ""))
        return learner.publish(version, self.times)

    def fetch(self, value: T) -> T:
        limit = self._deadlines.call_s
        try:
            found: T = fetch_rows(value, limit)
        except (RayError, TensorsLost) as error:
            reraise(translate(error, Call("driver", "fetch", self.step), "the object store", limit))
        return found

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return run_parallel(calls)

    def background(self, call: Callable[[], T]) -> Task[T]:
        return in_thread(call)

    def pool_metrics(self) -> dict[str, float]:
        pools = {name: group for name, group in self._groups.items() if isinstance(group, Pool)}
        return {f"pool/{name}/{key}": value for name, pool in pools.items() for key, value in pool.figures().items()}

    def end_attempt(self, newest: int) -> None:
        """End the groups that have lost a rank, and all calls of the attempt; without a checkpoint the others start from nothing too."""
        for lease in self._leases.values():
            lease.end()
        groups = [group for group in self._groups.values() if isinstance(group, StatefulGroup)]
        for group in groups if self.is_alive else ():
            if group.is_whole:
                group.notice_lost()
            if not group.is_whole:
                group.close()
            elif not newest:
                group.reset()

    def _hand_over(self, current_step: Callable[[], int | None]) -> dict[str, StatefulGroup | Pool]:
        """Give what is whole of it to the caller, and close the rest."""
        whole: dict[str, StatefulGroup | Pool] = {}
        for name, group in self._groups.items():
            if not group.is_whole:
                group.close()
            else:
                whole[name] = group if isinstance(group, Pool) else group.hand_over(current_step)
        self._groups = {}
        return whole

    @property
    def is_alive(self) -> bool:
        """Return True if the cluster, and so its pools, can still be used."""
        return self._cluster.is_alive()

    def close(self) -> None:
        for group in self._groups.values() if self.is_alive else ():
            group.close()
        self._groups = {}
        if self._gang is not None and self.is_alive:
            self._gang.release()
        self._gang = None
        self._cluster.leave()

    def _start(self, group: WorkerGroup) -> StatefulGroup | Pool:
        assert self._gang is not None
        places = self._gang.places[group.name]
        return StatefulGroup(group, places, lambda: self.step) if group.stateful else Pool(group, places)


def _reserve(groups: Sequence[WorkerGroup], cluster: Cluster) -> Gang:
    """Ask for room for all workers. A private Ray has one machine, so a job that it cannot hold is refused at once."""
    if cluster.private:
        check_placement(groups, cluster.nodes())
    else:
        check_shares(groups)
    return Gang(groups)


def _cluster_after(previous: RayRuntime | None) -> Cluster:
    """The cluster of the attempt before, or, where that is gone or there was none, another one."""
    if previous is not None and previous.is_alive:
        previous._cluster.forget_lost()
        return previous._cluster
    if previous is not None:
        previous.close()
    return Cluster.join()
