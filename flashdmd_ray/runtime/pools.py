"""Pools of interchangeable, stateless workers (rollout, rewards): calls are replayed on another worker, the size may change
while the job runs."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from flashdmd_ray.batch import Batch
from flashdmd_ray.config import PoolConfig
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.runtime.autoscale import Demand
from flashdmd_ray.runtime.call_times import Reply
from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.errors import Call, Closed, RoleFailed, TensorsLost, WorkerError
from flashdmd_ray.runtime.failures import reraise, translate
from flashdmd_ray.runtime.gang import Places
from flashdmd_ray.runtime.members import Member, Members
from flashdmd_ray.runtime.placement import WorkerGroup, is_reward
from flashdmd_ray.runtime.usage import PoolState
from flashdmd_ray.runtime.wire import start_call, together

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Between two looks at the queue of a growing pool."""


class PoolLease:
    """A pool for the calls of one attempt. A thread that the attempt has left behind can make no more of them when it is over."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._is_over = False

    def call(
        self, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False
    ) -> Reply:
        """See `Pool.call`. Raises Closed after `end`."""
        if self._is_over:
            raise Closed
        return self._pool.call(role, method, args, kwargs, traced)

    def end(self) -> None:
        """Refuse all further calls."""
        self._is_over = True


class Pool:
    """Calls to interchangeable workers, each to one that is idle. Callers on several threads share them; a caller that finds none waits."""

    def __init__(self, group: WorkerGroup, places: Places) -> None:
        """Start its workers in `places`; returns at once. `attach` it to a runtime before its first call."""
        placed = group.config.placement.of(group.name)
        assert isinstance(placed, PoolConfig)
        self._group = group
        self._deadlines = group.config.deadlines
        self._current_step: Callable[[], int | None]
        self._check_size: Callable[[int], None]
        self._ray_is_alive: Callable[[], bool]
        self._low = placed.workers
        self._high = placed.max_workers or placed.workers
        self._members = Members(group, places)
        if self._high > self._low:
            in_thread(functools.partial(self._follow, Demand(placed.shrink_after_s)))

    def attach(
        self,
        current_step: Callable[[], int | None],
        check_size: Callable[[int], None],
        ray_is_alive: Callable[[], bool],
    ) -> None:
        """Serve a runtime, which may be that of another attempt than before.

        check_size: raises ValueError when the cluster has no room for that many workers.
        """
        self._current_step = current_step
        self._ray_is_alive = ray_is_alive
        self._check_size = check_size

    @property
    def is_whole(self) -> bool:
        """False once it was closed, or could not start."""
        return self._members.failure is None

    def setup(self) -> None:
        """Wait until every worker is up; raises what a role raised, or a WorkerError."""
        self._members.wait_until_up()

    @property
    def size(self) -> int:
        """Workers the pool has or is bringing up."""
        return self._members.size

    def state(self) -> PoolState:
        """Sizes and counts of this moment."""
        with self._members.changed:
            usage = self._members.usage
            return PoolState(self.size, usage.ready, usage.busy, usage.waiting, self._low, self._high, usage.busy_share)

    def figures(self) -> dict[str, float]:
        """See `Usage.take_figures`."""
        with self._members.changed:
            return self._members.usage.take_figures()

    def resize(self, workers: int) -> None:
        """Grow or shrink by hand; no call is lost. A pool that grows by itself has this as its least size from now on.

        Raises ValueError when `workers` is below 1 or finds no room.
        """
        if workers < 1:
            raise ValueError(f"{self._group.key}.workers: a pool needs at least 1 worker, got {workers}")
        self._check_size(workers)
        with self._members.changed:
            self._high = workers if self._high == self._low else max(self._high, workers)
            self._low = workers
        self._members.set_size(workers)

    def call(
        self, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False
    ) -> Reply:
        """Run a method on any worker; replay it on another one, `deadlines.retries` times, when its worker is lost,
        hangs or fails.

        A reward's own errors are replayed too: a server may be busy, or one machine at fault. A rollout's would come back.
        """
        call = Call(role, method, self._current_step())
        timeout = self._deadlines.reward_s if is_reward(role) else self._deadlines.call_s
        for replays_left in reversed(range(self._deadlines.retries + 1)):
            member = self._members.take(call, self._deadlines.start_s + timeout)
            name = self._members.name(member)
            try:
                answer, *store = start_call(member.actor, role, method, args, kwargs, traced)
                reply: Reply = together(ray.get(answer, timeout=timeout), store)
            except RayError as error:
                failure = translate(error, call, name, timeout, member.last_lines)
            except BaseException:
                self._members.replace(member)  # interrupted: the worker is still busy with a call that nobody waits for
                raise
            else:
                self._members.give_back(member)
                return reply
            self._after_failure(member, failure)
            passing = (isinstance(failure, WorkerError) or is_reward(role)) and not isinstance(failure, TensorsLost)
            if not passing or replays_left == 0 or not self.is_whole:
                reraise(failure)
            message = failure if isinstance(failure, WorkerError) else f"{name}: {type(failure).__name__}: {failure}"
            log.warning("%s; the call is replayed (%d left)", one_line(message, 400), replays_left - 1)
            with self._members.changed:
                self._members.usage.count_replay(_prompt_groups(args))
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End all workers; calls from now on raise Closed."""
        self._members.close()

    def _after_failure(self, member: Member, failure: Exception) -> None:
        if not self._ray_is_alive():
            # Another call would have Ray look for the objects of the lost node, and then end this process without a word.
            self._members.close(failure)
        elif isinstance(failure, WorkerError) and not isinstance(failure, RoleFailed | TensorsLost):
            self._members.replace(member)  # gone, or hanging in a call
        else:
            self._members.give_back(member)

    def _follow(self, demand: Demand) -> None:
        """Keep as many workers as calls ask for, between the least and the largest size, until the pool is closed."""
        members = self._members
        while members.failure is None:
            with members.changed:
                demand.note(time.monotonic(), members.usage.busy + members.usage.waiting)
                target = demand.target(members.size, self._low, self._high)
            if target != members.size:
                members.set_size(self._with_room(target))
            time.sleep(POLL_S)

    def _with_room(self, target: int) -> int:
        """Return `target`; when the cluster has no room for so many, the present size, which is the largest from then on."""
        size = self._members.size
        try:
            if target > size:
                self._check_size(target)
        except ValueError as error:
            log.warning("%s stays at %d workers: %s", self._group.name, size, error)
            self._high = max(self._low, size)
            return size
        log.info("%s: %d -> %d workers", self._group.name, size, target)
        return target


def _prompt_groups(args: tuple[Any, ...]) -> int:
    """Count the prompt groups that a call is about."""
    return max((len(value) for value in args if isinstance(value, Batch)), default=0)
