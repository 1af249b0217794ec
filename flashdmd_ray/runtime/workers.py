"""Worker processes, and the stateful groups made of them (learner, discriminator)."""

from __future__ import annotations

import copy
import gc
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.run.variables import prepare_environment
from flashdmd_ray.runtime.border import CPU, call_role
from flashdmd_ray.runtime.call_times import CallTimes, Reply, Spent, metered
from flashdmd_ray.runtime.concurrency import in_thread
from flashdmd_ray.runtime.environment import limit_threads, on_gpu, uncollected, worker_environment
from flashdmd_ray.runtime.errors import Call, Closed, TensorsLost, WorkerError
from flashdmd_ray.runtime.failures import most_telling, reraise, translate
from flashdmd_ray.runtime.gang import Places
from flashdmd_ray.runtime.handles import RoleHandle
from flashdmd_ray.runtime.placement import WorkerGroup, check_devices, create_roles, role_class
from flashdmd_ray.runtime.protocol import Task
from flashdmd_ray.runtime.shards import join_results, split_arguments
from flashdmd_ray.runtime.wire import apart, published, register_tensors, start_call, together, with_fetched
from flashdmd_ray.runtime.worker_logs import last_lines, own_log

GRACE_S = 1.0
"""After one rank failed, how long to wait for the others' errors, to report the one that caused them."""


@dataclass(frozen=True)
class RoleReference:
    """Argument that stands for the role of that name in the receiving process."""

    role: str


@dataclass(frozen=True)
class Offer:
    """A worker's address and port for the ranks to meet at, and the node and file of its log."""

    address: str
    port: int
    log: tuple[str, str]


class Worker:
    """Process with one or more roles. Everything heavy is imported in it, after it has started."""

    def __init__(self, group: WorkerGroup, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._config = group.config
        self._roles: dict[str, Any] = {}
        self._listener: socket.socket
        prepare_environment(os.environ)
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")

    def __repr__(self) -> str:
        return worker_name(self._group, self._rank)  # the prefix of this process's log lines

    def prepare(self) -> Offer:
        """Import what the roles need, and offer an address and a port for the ranks to meet at."""
        with uncollected():
            for path in self._group.roles.values():
                role_class(path)
        address = ray.util.get_node_ip_address()
        self._listener = socket.create_server((address, 0), backlog=1024)  # held, so that nobody takes the port
        return Offer(address, self._listener.getsockname()[1], own_log())

    def join(self, offer: Offer) -> None:
        """Meet the other ranks. offer: that of rank 0."""
        limit_threads(self._config.placement.threads)
        if self._group.gpus:
            on_gpu()
        register_tensors()
        self._check_devices()
        world_size = self._group.workers if self._group.stateful else 1
        with self._listener as listener:
            if self._group.stateful and (world_size > 1 or self._config.engine.kind == "deepspeed"):
                from flashdmd_ray.engine import init_process_group

                timeout = self._config.deadlines.call_s
                init_process_group(self._rank, world_size, offer.address, offer.port, timeout, listener)

    def build(self) -> None:
        """Build the roles. Those that were there before are gone first."""
        self._roles = {}
        gc.collect()
        self._roles = create_roles(self._group, self._rank, self._group.workers if self._group.stateful else 1)
        if self._config.data.decode == "ray":
            from flashdmd_ray.runtime.data_stream import decode_on_ray

            decode_on_ray(list(self._roles.values()), self._config.data)

    def call(
        self, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False
    ) -> Reply:
        """Run one method of one role; see `call_role`."""
        args, kwargs = with_fetched(args, kwargs, self._config.deadlines.call_s)
        args = tuple(self._resolve(value) for value in args)
        kwargs = {name: self._resolve(value) for name, value in kwargs.items()}
        return call_role(self._roles[role], method, args, kwargs, traced)

    def make(self, *call: Any) -> tuple[Reply, Any]:
        """See `call`. The large tensors of its result are a value of their own, which stays in the object store."""
        return apart(self.call(*call))

    def publish(self, version: int) -> Reply:
        """Put the generator's weights into the object store; rank 0 of the learner does, the others help to gather them."""

        def publish() -> PublishedWeights | None:
            weights = self._roles["generator"].live_weights()
            return None if self._rank else published(weights, version)

        return metered(publish, getattr(self._roles["generator"], "device", CPU), traced=False)

    def _resolve(self, value: Any) -> Any:
        return self._roles[value.role] if isinstance(value, RoleReference) else value

    def _check_devices(self) -> None:
        import torch

        check_devices(self._group, len(ray.get_gpu_ids()), torch.cuda.device_count())


def worker_name(group: WorkerGroup, rank: int) -> str:
    return f"{group.name}-{rank}"


def start_worker(group: WorkerGroup, rank: int, options: Mapping[str, Any]) -> Any:
    """Ask Ray for one worker process; returns its actor handle at once. options: of its place, see `Places.options`.

    Never restarted by Ray: that would run the constructor again and silently go on with initial weights. Groups are
    rebuilt by the supervisor from a checkpoint; pools put a new worker in the place of a lost one.
    """
    environment = worker_environment(group.config.placement.threads, group.gpus)
    environment["FLASHDMD_WORKER"] = worker_name(group, rank)  # tells the processes of a machine apart
    settings = {
        "num_cpus": group.cpus,
        "num_gpus": group.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": environment},
        **options,
    }
    return ray.remote(Worker).options(**settings).remote(group, rank)


class StatefulGroup:
    """Ranks of one worker group.

    Every call goes to all ranks at once and has a deadline. A process that fails, or that does not answer, ends the group; what all ranks
    raise about their input or their numbers does not, nor do tensors that were lost before the ranks read them.
    """

    def __init__(self, group: WorkerGroup, places: Places, current_step: Callable[[], int | None]) -> None:
        """Start all ranks in `places`; returns at once."""
        self._group = group
        self._deadlines = group.config.deadlines
        self._current_step = current_step
        self._order = threading.Lock()
        self._failure: Exception | None = None
        self._has_joined = self._is_built = False
        self._offers: list[Offer] = []
        self._places = [(places, places.take()) for _ in range(group.workers)]
        options = [places.options(place) for _, place in self._places]
        self._actors = [start_worker(group, rank, each) for rank, each in enumerate(options)]

    def setup(self) -> None:
        """Bring up all ranks and their roles where they are not; raises what a role raised, or a WorkerError."""
        call, timeout = Call(self._group.name, "start"), self._deadlines.start_s
        if not self._has_joined:
            self._offers = self._wait([actor.prepare.remote() for actor in self._actors], call, timeout)
            self._wait([actor.join.remote(self._offers[0]) for actor in self._actors], call, timeout)
            self._has_joined = True
        if not self._is_built:
            self._wait([actor.build.remote() for actor in self._actors], call, timeout)
            self._is_built = True

    @property
    def is_whole(self) -> bool:
        """True while all ranks are up and none has failed: they can be loaded from a checkpoint where they are."""
        return self._has_joined and self._failure is None

    def notice_lost(self) -> None:
        """Fail now, not at the next call, when a process has ended since the last one. One that is busy is not waited for."""
        refs = [actor.__ray_ready__.remote() for actor in self._actors]
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
        try:
            ray.get(answered)
        except RayError as error:
            self._failure = self._failure or self._explain(refs, error, Call(self._group.name, "look"), GRACE_S)

    def reset(self) -> None:
        """Have `setup` build the roles anew in the same processes: without a checkpoint nothing else takes back what was trained."""
        self._is_built = False

    def hand_over(self, current_step: Callable[[], int | None]) -> StatefulGroup:
        """Return a group of the same processes for another attempt.

        A thread that this attempt has left behind can make no more calls; those it has made are done before the first of the new group.
        """
        other = copy.copy(self)
        other._current_step = current_step
        with self._order:
            self._failure = Closed()
        return other

    def call(
        self, role: str, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], traced: bool = False
    ) -> Reply:
        """Split the arguments, call all ranks, join the results. traced: rank 0 is."""
        args = tuple(self._reference(value) for value in args)
        kwargs = {name: self._reference(value) for name, value in kwargs.items()}
        shards, sizes = split_arguments(args, kwargs, len(self._actors))
        with self._order:  # calls from several threads must reach all ranks in one order, or their collectives would wait for each other
            if self._failure is not None:
                raise self._failure
            started = [
                start_call(actor, role, method, *shard, traced and rank == 0)
                for rank, (actor, shard) in enumerate(zip(self._actors, shards, strict=True))
            ]
        answers = [refs[0] for refs in started]
        found = self._wait(answers, Call(role, method, self._current_step()), self._deadlines.call_s)
        replies = [together(reply, refs[1:]) for reply, refs in zip(found, started, strict=True)]
        return Reply(join_results([reply.result for reply in replies], sizes), _all_spent(replies))

    def publish(self, version: int, times: CallTimes) -> Task[PublishedWeights]:
        """Publish the weights as they are after the calls made so far. The driver gets a reference alone."""
        if self._failure is not None:
            raise self._failure
        with self._order:
            refs = [actor.publish.remote(version) for actor in self._actors]
        call = Call("generator", "publish", self._current_step())

        def wait() -> PublishedWeights:
            replies = self._wait(refs, call, self._deadlines.call_s)
            times.add(self._group.name, "generator", "publish", _all_spent(replies), None)
            weights: PublishedWeights = replies[0].result
            return weights

        return in_thread(wait)

    def has(self, role: str) -> bool:
        """Return True if the role lives in these processes."""
        return role in self._group.roles

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, RoleHandle):
            return value
        assert value.role in self._group.roles, "a role can be passed only to a role in the same processes"
        return RoleReference(value.role)

    def _wait(self, refs: list[ray.ObjectRef], call: Call, timeout: float) -> list[Any]:
        started = time.monotonic()
        try:
            return ray.get(refs, timeout=timeout)
        except RayError as error:
            noticed = time.monotonic()
            _, silent = ray.wait(refs, num_returns=len(refs), timeout=GRACE_S)
            failure = self._explain(refs, error, call, timeout)
        if isinstance(failure, WorkerError):
            failure.detect_s = noticed - started
        if silent or (isinstance(failure, WorkerError) and not isinstance(failure, TensorsLost)):
            self._failure = failure
        reraise(failure)

    def _explain(self, refs: list[ray.ObjectRef], first: RayError, call: Call, timeout: float) -> Exception:
        errors = []
        for rank, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=0)
            except RayError as error:
                name, log = worker_name(self._group, rank), self._offers[rank].log if self._offers else ("", "")
                errors.append(translate(error, call, name, timeout, partial(last_lines, *log)))
        return most_telling(errors) if errors else translate(first, call, self._group.name, timeout)

    def close(self) -> None:
        self._failure = self._failure or Closed(f"the {self._group.name} group was closed")
        for actor in self._actors:
            ray.kill(actor)
        for places, place in self._places:
            places.give_back(place)
        self._places = []


def _all_spent(replies: Sequence[Reply]) -> tuple[Spent, ...]:
    return tuple(spent for reply in replies for spent in reply.spent)
