"""Worker processes of one pool: brought up, replaced when lost, added and ended as its size changes."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.errors import Call, Closed, DeadlineExceeded, WorkerLost
from flashdmd_ray.runtime.failures import translate
from flashdmd_ray.runtime.gang import Places
from flashdmd_ray.runtime.placement import WorkerGroup
from flashdmd_ray.runtime.usage import Usage
from flashdmd_ray.runtime.worker_logs import last_lines
from flashdmd_ray.runtime.workers import start_worker, worker_name

log = logging.getLogger(__name__)

FAILED_STARTS = 3
"""Workers in a row that do not come up before a pool without any answers calls with that error."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Before another worker is tried, doubling each time."""


@dataclass(eq=False)
class Member:
    """One worker of a pool.

    `number` never repeats, so that log lines of a replacement are not those of the lost worker.
    """

    actor: Any
    number: int
    place: int | None
    """Reserved for it; None for a worker that has asked Ray for room of its own."""
    ready: bool = False
    log: tuple[str, str] = ("", "")
    """Node and file of its standard error."""

    def last_lines(self) -> str:
        """The end of its log, in one line."""
        return last_lines(*self.log)


class Members:
    """Worker processes of a pool, lent to one call at a time. Safe for threads.

    `changed` guards everything here, `usage` too: hold it to read several of its figures at once.
    """

    def __init__(self, group: WorkerGroup, places: Places) -> None:
        """Start bringing up as many workers as the group has, and return at once."""
        self.changed = threading.Condition()
        self.usage = Usage()
        self.size = group.workers
        """Workers there are or are being brought up."""
        self.failure: Exception | None = None
        """Why no call can be made any more."""
        self._group = group
        self._places = places
        self._start_s = group.config.deadlines.start_s
        self._numbers = itertools.count()
        self._members: set[Member] = set()
        self._idle: list[Member] = []
        self._failed_starts = 0
        self._is_up = False
        self._grow()

    def name(self, member: Member) -> str:
        """Return the worker's name in messages and logs."""
        return worker_name(self._group, member.number)

    def wait_until_up(self) -> None:
        """Wait until every worker is up. Raises what a role raised, or a WorkerError."""
        with self.changed:
            self.changed.wait_for(lambda: self.failure or self.usage.ready >= self.size, self._start_s)
            if self.failure is not None:
                raise self.failure
            if self.usage.ready < self.size:
                came_up = f"{self.usage.ready} of {self.size} workers came up within {self._start_s:g} s"
                raise DeadlineExceeded(f"{Call(self._group.name, 'start')}: {came_up}")
            self._is_up = True

    def take(self, call: Call, timeout_s: float) -> Member:
        """Wait for an idle worker; it belongs to the caller until `give_back` or `replace`. Raises a WorkerError when none comes."""
        end = time.monotonic() + timeout_s
        with self.changed:
            self.usage.adjust(waiting=1)
            try:
                while not self._idle:
                    self._refuse_without_workers(call)
                    if not self.changed.wait(end - time.monotonic()):
                        busy = f"none of {self.size} {self._group.name} workers was free within {timeout_s:g} s"
                        raise DeadlineExceeded(f"{call}: {busy}; add workers")
                if self.failure is not None:
                    raise self.failure
            finally:
                self.usage.adjust(waiting=-1)
            self.usage.adjust(busy=1)
            return self._idle.pop()

    def _refuse_without_workers(self, call: Call) -> None:
        if self.failure is not None:
            raise self.failure
        if self._failed_starts >= FAILED_STARTS and not self.usage.ready:
            raise WorkerLost(f"{call}: no {self._group.name} worker is left, and none comes up; see its log")

    def give_back(self, member: Member) -> None:
        """Take a worker back after its call; it is ended when there are too many."""
        with self.changed:
            if member not in self._members:
                return
            self.usage.adjust(busy=-1)
            self._idle.append(member)
            if len(self._members) > self.size:
                self._end(member)
            else:
                self.changed.notify_all()  # one alone might wake `wait_until_up`, which takes no worker

    def replace(self, member: Member) -> None:
        """End a worker that is gone or hangs, and bring up another one."""
        with self.changed:
            self._end(member)
        self._grow()

    def set_size(self, size: int) -> None:
        """Bring up or end workers; those in a call finish it first."""
        with self.changed:
            self.size = size
            while self._idle and len(self._members) > size:
                self._end(self._idle[-1])
        self._grow()

    def close(self, reason: Exception | None = None) -> None:
        """End all workers; calls from now on raise `reason`, or Closed."""
        with self.changed:
            self.failure = self.failure or reason or Closed(f"the {self._group.name} pool was closed")
            for member in list(self._members):
                self._end(member)
            self.changed.notify_all()

    def _grow(self) -> None:
        with self.changed:
            while self.failure is None and len(self._members) < self.size:
                number = next(self._numbers)
                place = self._places.take()
                member = Member(start_worker(self._group, number, self._places.options(place)), number, place)
                self._members.add(member)
                in_thread(functools.partial(self._bring_up, member))

    def _bring_up(self, member: Member) -> None:
        """Load a new worker's role, then offer it.

        A worker that cannot load while the job starts ends the pool: its replacement would fail alike. Later on another one
        is tried, after a pause.
        """
        try:
            offer = ray.get(member.actor.prepare.remote(), timeout=self._start_s)
            member.log = offer.log
            ray.get([member.actor.join.remote(offer), member.actor.build.remote()], timeout=self._start_s)
        except Exception as error:
            self._failed_to_start(member, error)
            return
        with self.changed:
            if member not in self._members:
                return
            member.ready, self._failed_starts = True, 0
            self.usage.adjust(ready=1, busy=1)  # `give_back` counts it out again
        self.give_back(member)

    def _failed_to_start(self, member: Member, error: Exception) -> None:
        failure = translate(error, Call(self._group.name, "start"), self.name(member), self._start_s, member.last_lines)
        with self.changed:
            if member not in self._members:
                return
            if not self._is_up:
                self.failure = self.failure or failure
                self.changed.notify_all()
                return
            self._end(member)
            self._failed_starts += 1
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._failed_starts - 1))
            self.changed.notify_all()
        log.warning("%s; another worker is tried in %g s", failure, pause)
        time.sleep(pause)
        self._grow()

    def _end(self, member: Member) -> None:
        if member not in self._members:
            return
        self._members.remove(member)
        if member in self._idle:
            self._idle.remove(member)
        elif member.ready:
            self.usage.adjust(busy=-1)
        if member.ready:
            self.usage.adjust(ready=-1)
        ray.kill(member.actor)
        self._places.give_back(member.place)
