"""Pools of interchangeable, stateless workers (rollout, reward): lost ones are replaced, their calls are replayed, the
size may change."""

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

from flashdmd_ray.config import Config
from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.errors import Call, DeadlineExceeded, RoleFailed, WorkerError
from flashdmd_ray.runtime.failures import reraise, translate
from flashdmd_ray.runtime.placement import WorkerGroup
from flashdmd_ray.runtime.workers import start_worker, worker_name

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Member:
    """One worker of a pool.

    `number` never repeats, so that log lines of a replacement are not those of the lost worker.
    """

    actor: Any
    number: int


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
        self._group = group
        self._config = config
        self._current_step = current_step
        self._check_size = check_size
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._members: set[Member] = set()
        self._idle: list[Member] = []
        self._size = group.workers
        self._failure: Exception | None = None
        self._grow()

    def setup(self) -> None:
        """Wait until every worker is up; raises what a role raised, or a WorkerError."""
        timeout = self._config.deadlines.start_s
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._idle) >= self._size, timeout)
            if self._failure is not None:
                raise self._failure
            if len(self._idle) < self._size:
                came_up = f"{len(self._idle)} of {self._size} workers came up within {timeout:g} s"
                raise DeadlineExceeded(f"{Call(self._group.name, 'start')}: {came_up}")

    @property
    def size(self) -> int:
        """Workers the pool has or is bringing up."""
        return self._size

    def resize(self, workers: int) -> None:
        """Grow or shrink; no call is lost. Raises ValueError when `workers` is below 1 or finds no room."""
        if workers < 1:
            raise ValueError(f"{self._group.key}.workers: a pool needs at least 1 worker, got {workers}")
        self._check_size(workers)
        with self._changed:
            self._size = workers
            while self._idle and len(self._members) > self._size:
                self._end(self._idle.pop())
        self._grow()

    def call(self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a method on any worker; replay it on another one, `deadlines.retries` times, when its worker is lost,
        hangs or fails."""
        (role,) = self._group.roles
        call = Call(role, method, self._current_step())
        deadlines = self._config.deadlines
        timeout = deadlines.reward_s if role == "rewards" else deadlines.call_s
        for replays_left in reversed(range(self._config.deadlines.retries + 1)):
            member = self._take(call)
            try:
                result = ray.get(member.actor.call.remote(role, method, args, kwargs), timeout=timeout)
            except RayError as error:
                failure = translate(error, call, worker_name(self._group, member.number), timeout)
            except BaseException:
                self._replace(member)  # interrupted: the worker is still busy with a call that nobody waits for
                raise
            else:
                self._give_back(member)
                return result
            self._after_failure(member, failure)
            if not isinstance(failure, WorkerError) or replays_left == 0:
                reraise(failure)
            log.warning("%s; the call is replayed (%d left)", failure, replays_left - 1)
        raise AssertionError("unreachable")

    def close(self) -> None:
        with self._changed:
            self._failure = self._failure or WorkerError(f"the {self._group.name} pool was closed")
            for member in list(self._members):
                self._end(member)
            self._idle.clear()
            self._changed.notify_all()

    def _grow(self) -> None:
        with self._changed:
            while self._failure is None and len(self._members) < self._size:
                number = next(self._numbers)
                member = Member(start_worker(self._group, number, self._config), number)
                self._members.add(member)
                in_thread(functools.partial(self._bring_up, member))

    def _bring_up(self, member: Member) -> None:
        """Load a new worker's role, then offer it.

        A worker that cannot load ends the pool: its replacement would fail alike.
        """
        timeout = self._config.deadlines.start_s
        try:
            address, port = ray.get(member.actor.prepare.remote(), timeout=timeout)
            ray.get(member.actor.setup.remote(address, port), timeout=timeout)
        except Exception as error:
            with self._changed:
                if member in self._members:
                    name = worker_name(self._group, member.number)
                    self._failure = self._failure or translate(error, Call(self._group.name, "start"), name, timeout)
                    self._changed.notify_all()
            return
        self._give_back(member)

    def _take(self, call: Call) -> Member:
        patience = self._config.deadlines.start_s + self._config.deadlines.call_s
        give_up = time.monotonic() + patience
        with self._changed:
            while not self._idle and self._failure is None:
                if not self._changed.wait(give_up - time.monotonic()):
                    busy = f"none of {self._size} {self._group.name} workers was free within {patience:g} s"
                    raise DeadlineExceeded(f"{call}: {busy}; add workers")
            if self._failure is not None:
                raise self._failure
            return self._idle.pop()

    def _give_back(self, member: Member) -> None:
        with self._changed:
            if member not in self._members:
                return
            if len(self._members) > self._size:
                self._end(member)
            else:
                self._idle.append(member)
                self._changed.notify()

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
        if member in self._members:
            self._members.remove(member)
            ray.kill(member.actor)


class PoolHandle:
    """The role of a pool, with the methods of its class."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def resize(self, workers: int) -> None:
        """Change the number of workers while the job runs."""
        self.pool.resize(workers)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return functools.partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.pool.call(method, args, kwargs)
