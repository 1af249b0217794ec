"""Pools of interchangeable, stateless workers (rollout, rewards): lost ones are replaced, their calls are replayed, the
size may change while the job runs."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from flashdmd_ray.batch import Batch
from flashdmd_ray.config import Config, PoolConfig
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.runtime.autoscale import Demand
from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.errors import Call, DeadlineExceeded, PoolClosed, RoleFailed, WorkerError, WorkerLost
from flashdmd_ray.runtime.failures import reraise, translate
from flashdmd_ray.runtime.placement import WorkerGroup
from flashdmd_ray.runtime.usage import PoolState, Usage
from flashdmd_ray.runtime.workers import start_worker, worker_name

log = logging.getLogger(__name__)

LOOK_S = 0.25
"""Between two looks at the queue of a growing pool."""
FAILED_STARTS = 3
"""Workers in a row that do not come up before a pool without any answers calls with that error."""
REST_S, LONGEST_REST_S = 1.0, 30.0
"""Before a further try, doubling each time."""


@dataclass(eq=False)
class Member:
    """One worker of a pool.

    `number` never repeats, so that log lines of a replacement are not those of the lost worker.
    """

    actor: Any
    number: int
    ready: bool = False


class Pool:
    """Each call goes to one idle worker. Callers on several threads share the workers; whoever finds none idle waits."""

    def __init__(
        self,
        group: WorkerGroup,
        config: Config,
        current_step: Callable[[], int | None],
        check_size: Callable[[int], None],
    ) -> None:
        """check_size: raises ValueError when the cluster has no room for that many workers."""
        placed = config.placement.of(group.name)
        assert isinstance(placed, PoolConfig)
        (self._role,) = group.roles
        self._group = group
        self._config = config
        self._current_step = current_step
        self._check_size = check_size
        self._timeout = config.deadlines.reward_s if self._role == "rewards" else config.deadlines.call_s
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._members: set[Member] = set()
        self._idle: list[Member] = []
        self._usage = Usage()
        self._size = self._low = placed.workers
        self._high = placed.max_workers or placed.workers
        self._failure: Exception | None = None
        self._failed_starts = 0
        self._is_up = False
        self._grow()
        if self._high > self._low:
            in_thread(functools.partial(self._follow, Demand(placed.shrink_after_s)))

    def setup(self) -> None:
        """Wait until every worker is up; raises what a role raised, or a WorkerError."""
        timeout = self._config.deadlines.start_s
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._usage.ready >= self._size, timeout)
            if self._failure is not None:
                raise self._failure
            if self._usage.ready < self._size:
                came_up = f"{self._usage.ready} of {self._size} workers came up within {timeout:g} s"
                raise DeadlineExceeded(f"{Call(self._group.name, 'start')}: {came_up}")
            self._is_up = True

    @property
    def size(self) -> int:
        """Workers the pool has or is bringing up."""
        return self._size

    def state(self) -> PoolState:
        with self._changed:
            usage = self._usage
            return PoolState(
                self._size, usage.ready, usage.busy, usage.waiting, self._low, self._high, usage.busy_share
            )

    def figures(self) -> dict[str, float]:
        """See `Usage.take`."""
        with self._changed:
            return self._usage.take()

    def resize(self, workers: int) -> None:
        """Grow or shrink by hand; no call is lost. A pool that grows by itself has this as its least size from now on.

        Raises ValueError when `workers` is below 1 or finds no room.
        """
        if workers < 1:
            raise ValueError(f"{self._group.key}.workers: a pool needs at least 1 worker, got {workers}")
        self._check_size(workers)
        with self._changed:
            self._high = workers if self._high == self._low else max(self._high, workers)
            self._low = workers
        self._set_size(workers)

    def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a method on any worker; replay it on another one, `deadlines.retries` times, when its worker is lost,
        hangs or fails.

        A reward's own errors are replayed too: a server may be busy, or one machine at fault. A rollout's would come back.
        """
        call = Call(self._role, method, self._current_step())
        for replays_left in reversed(range(self._config.deadlines.retries + 1)):
            member = self._take(call)
            name = worker_name(self._group, member.number)
            try:
                result = ray.get(member.actor.call.remote(self._role, method, args, kwargs), timeout=self._timeout)
            except RayError as error:
                failure = translate(error, call, name, self._timeout)
            except BaseException:
                self._replace(member)  # interrupted: the worker is still busy with a call that nobody waits for
                raise
            else:
                self._give_back(member)
                return result
            self._after_failure(member, failure)
            passing = isinstance(failure, WorkerError) or self._role == "rewards"
            if not passing or replays_left == 0:
                reraise(failure)
            what = failure if isinstance(failure, WorkerError) else f"{name}: {type(failure).__name__}: {failure}"
            log.warning("%s; the call is replayed (%d left)", one_line(what, 400), replays_left - 1)
            with self._changed:
                self._usage.replay(_groups(args))
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._changed:
            self._failure = self._failure or PoolClosed(f"the {self._group.name} pool was closed")
            for member in list(self._members):
                self._end(member)
            self._changed.notify_all()

    def _set_size(self, workers: int) -> None:
        with self._changed:
            self._size = workers
            while self._idle and len(self._members) > self._size:
                self._end(self._idle[-1])
        self._grow()

    def _follow(self, demand: Demand) -> None:
        """Until the pool is closed: as many workers as calls ask for, between the least and the largest size."""
        while self._failure is None:
            with self._changed:
                demand.note(time.monotonic(), self._usage.busy + self._usage.waiting)
                wanted = demand.wanted(self._size, self._low, self._high)
            if wanted != self._size:
                self._set_size(self._with_room(wanted))
            time.sleep(LOOK_S)

    def _with_room(self, wanted: int) -> int:
        """`wanted`, or the present size, for good, when the cluster has no room for more."""
        try:
            if wanted > self._size:
                self._check_size(wanted)
        except ValueError as error:
            log.warning("%s stays at %d workers: %s", self._group.name, self._size, error)
            self._high = max(self._low, self._size)
            return self._size
        log.info("%s: %d -> %d workers", self._group.name, self._size, wanted)
        return wanted

    def _grow(self) -> None:
        with self._changed:
            while self._failure is None and len(self._members) < self._size:
                number = next(self._numbers)
                member = Member(start_worker(self._group, number, self._config), number)
                self._members.add(member)
                in_thread(functools.partial(self._bring_up, member))

    def _bring_up(self, member: Member) -> None:
        """Load a new worker's role, then offer it.

        A worker that cannot load while the job starts ends the pool: its replacement would fail alike. Later on another one
        is tried, after a rest.
        """
        timeout = self._config.deadlines.start_s
        try:
            address, port = ray.get(member.actor.prepare.remote(), timeout=timeout)
            ray.get(member.actor.setup.remote(address, port), timeout=timeout)
        except Exception as error:
            self._failed_to_start(member, error)
            return
        with self._changed:
            if member not in self._members:
                return
            member.ready, self._failed_starts = True, 0
            self._usage.change(ready=1, busy=1)  # `_give_back` counts it out again
        self._give_back(member)

    def _failed_to_start(self, member: Member, error: Exception) -> None:
        name = worker_name(self._group, member.number)
        failure = translate(error, Call(self._group.name, "start"), name, self._config.deadlines.start_s)
        with self._changed:
            if member not in self._members:
                return
            if not self._is_up:
                self._failure = self._failure or failure
                self._changed.notify_all()
                return
            self._end(member)
            self._failed_starts += 1
            rest = min(LONGEST_REST_S, REST_S * 2 ** (self._failed_starts - 1))
            self._changed.notify_all()
        log.warning("%s; another worker is tried in %g s", failure, rest)
        time.sleep(rest)
        self._grow()

    def _take(self, call: Call) -> Member:
        patience = self._config.deadlines.start_s + self._timeout
        give_up = time.monotonic() + patience
        with self._changed:
            self._usage.change(waiting=1)
            try:
                while not self._idle:
                    if self._failure is not None:
                        raise self._failure
                    if self._failed_starts >= FAILED_STARTS and not self._usage.ready:
                        raise WorkerLost(
                            f"{call}: no {self._group.name} worker is left, and none comes up; see its log"
                        )
                    if not self._changed.wait(give_up - time.monotonic()):
                        busy = f"none of {self._size} {self._group.name} workers was free within {patience:g} s"
                        raise DeadlineExceeded(f"{call}: {busy}; add workers")
                if self._failure is not None:
                    raise self._failure
            finally:
                self._usage.change(waiting=-1)
            self._usage.change(busy=1)
            return self._idle.pop()

    def _give_back(self, member: Member) -> None:
        with self._changed:
            if member not in self._members:
                return
            self._usage.change(busy=-1)
            self._idle.append(member)
            if len(self._members) > self._size:
                self._end(member)
            else:
                self._changed.notify_all()  # one alone might wake `setup`, which takes no worker

    def _after_failure(self, member: Member, failure: Exception) -> None:
        if isinstance(failure, WorkerError) and not isinstance(failure, RoleFailed):
            self._replace(member)  # gone, or hanging in a call
        else:
            self._give_back(member)

    def _replace(self, member: Member) -> None:
        with self._changed:
            self._end(member)
        self._grow()

    def _end(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        elif member.ready:
            self._usage.change(busy=-1)
        if member.ready:
            self._usage.change(ready=-1)
        ray.kill(member.actor)


def _groups(args: tuple[Any, ...]) -> int:
    """The prompt groups that a call is about."""
    return max((len(value) for value in args if isinstance(value, Batch)), default=0)
