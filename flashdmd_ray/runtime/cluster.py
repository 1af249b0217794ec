"""Ray cluster of a job: the one it was submitted to, or a private one that lives and dies with the job."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import grpc
import psutil
import ray

from flashdmd_ray.run.interruption import kept_from_children
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.run.shared_memory import store_bytes
from flashdmd_ray.run.variables import check_ray_address, ray_address
from flashdmd_ray.runtime.errors import NoRoom, WorkerLost
from flashdmd_ray.runtime.placement import Node

PRIVATE_CPUS = 256
"""CPUs a private cluster claims to have. Ray's CPUs only count reservations; on one machine the operating system
shares the cores, and a small number would make a pool that grows during the run wait for ever."""

STARTS = 3
"""Times a private cluster is tried. Ray gives some of its processes 15 s to come up, a constant in its code that a
busy machine can miss; the next try finds their files in memory."""

ANSWER_S = 10.0
"""Seconds for the cluster of RAY_ADDRESS to answer on a connection."""

FORGET_S, LOOK_S, ACCEPT_S = 60.0, 0.5, 3.0
"""Seconds for Ray to notice that a machine is gone, which takes it some 15; between two looks; for a machine to accept a connection."""

SERVERS = frozenset({"raylet", "gcs_server"})
"""The two processes of a private cluster that it cannot do without."""

SYSTEM_CONFIG = {
    # Workers with settings of their own are never taken from Ray's stock, which would be 256 idle processes.
    "prestart_worker_first_driver": False,
    "enable_worker_prestart": False,
    # One machine cannot lose itself: a slow answer means that it is busy.
    "health_check_timeout_ms": 120_000,
    "worker_register_timeout_seconds": 180,
    "agent_register_timeout_ms": 180_000,
}


@dataclass(frozen=True)
class Cluster:
    """Connection to Ray.

    joined: made here, so `leave` ends it, and with it all processes of a private cluster. processes: that were started for that.
    """

    joined: bool
    private: bool
    processes: tuple[psutil.Process, ...] = ()

    @classmethod
    def join(cls) -> Cluster:
        """Use the Ray this process talks to, else that of RAY_ADDRESS (set by `ray job submit`), else start one.

        Raises NoRoom, within seconds, when no Ray answers at RAY_ADDRESS, WorkerLost when none can be started.
        """
        if ray.is_initialized():
            return cls(joined=False, private=False)
        address, others = ray_address(os.environ), set(psutil.Process().children())
        with _signals_kept(), kept_from_children():
            if address is None:
                _start_private()
            else:
                join_running(address)
        started = () if address is not None else tuple(set(psutil.Process().children()) - others)
        return cls(True, address is None, started)

    def nodes(self) -> list[Node]:
        """Total resources of each living machine, in use or not."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(cpus=resources.get("CPU", 0.0), gpus=int(resources.get("GPU", 0))) for resources in alive]

    def forget_lost(self) -> None:
        """Wait, FORGET_S at most, until Ray knows which machines are gone: until then it would start workers on them."""
        end = time.monotonic() + FORGET_S
        while not self.private and time.monotonic() < end:
            if all(
                _accepts(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in ray.nodes() if node["Alive"]
            ):
                return
            time.sleep(LOOK_S)

    def is_alive(self) -> bool:
        """Return True if it can still be used: for a private one, if its raylet and its server run.

        Without the first, Ray ends this process at the next look for an object; without the second, a minute later.
        """
        if not ray.is_initialized():
            return False
        try:
            return not self.private or {child.name() for child in _running(self.processes)} >= SERVERS
        except psutil.NoSuchProcess:  # it ended just now
            return False

    def check(self, where: str = "") -> None:
        """Raise WorkerLost, with `where` before its text, when it cannot be used any more."""
        if not self.is_alive():
            gone = "a process of the private Ray is gone: killed, or ended by the system for want of memory"
            raise WorkerLost(f"{where}{gone}")

    def leave(self) -> None:
        """Disconnect from a cluster that `join` connected to; a private one ends, to its last process."""
        if self.joined and ray.is_initialized():
            tree = {below for process in _running(self.processes) for below in _tree(process)}
            # Ray ends its processes one after the other and waits a second for each: not for those that nothing depends on.
            _end(set(_running(self.processes, SERVERS)) if self.is_alive() else tree)
            ray.shutdown()
            _end(tree)


def gpus_of_cluster(address: str) -> list[str]:
    """The type of each GPU of a running cluster, such as "H100", or "" where Ray does not know it. Raises NoRoom like `join_running`."""
    return [_gpu_type(machine) for machine in machines_of_cluster(address) for _ in range(int(machine.get("GPU", 0)))]


def machines_of_cluster(address: str) -> list[dict[str, float]]:
    """Ray's total resources of each living machine of a running cluster. Raises NoRoom like `join_running`."""
    join_running(address)
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _gpu_type(resources: dict[str, float]) -> str:
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in resources if name.startswith(prefix)), "")


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), ACCEPT_S).close()
    except OSError:
        return False
    return True


def join_running(address: str) -> None:
    """Connect to the cluster at RAY_ADDRESS. Raises NoRoom when none answers: `ray.init` alone would wait for ever."""
    try:
        check_ray_address({"RAY_ADDRESS": address})
    except ValueError as error:
        raise NoRoom(str(error)) from None
    try:
        _check_answers(address)
        ray.init(logging_level=logging.ERROR)
    except Exception as error:  # Ray raises bare Exceptions, too
        raise NoRoom(
            f"RAY_ADDRESS={address}: cannot join a Ray there ({one_line(error)}); start it, correct the address, "
            "or unset RAY_ADDRESS for a private Ray"
        ) from None


def _check_answers(address: str) -> None:
    """Raise TimeoutError unless what listens at "host:port" speaks gRPC as Ray does."""
    if address == "auto" or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    channel = grpc.insecure_channel(address.removeprefix("ray://"), options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
    except grpc.FutureTimeoutError:
        raise TimeoutError(f"something listens, but does not answer as Ray within {ANSWER_S:g} s") from None
    finally:
        channel.close()


def _start_private() -> None:
    others = set(psutil.Process().children(recursive=True))
    for tries_left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=PRIVATE_CPUS,
                object_store_memory=store_bytes(),
                include_dashboard=False,
                logging_level=logging.CRITICAL,
                _system_config=SYSTEM_CONFIG,
            )
            return
        except OSError as error:
            raise ValueError(
                f"Ray cannot start ({one_line(error)}): it keeps its files in the folder ray of RAY_TMPDIR, TMPDIR or /tmp; "
                "set RAY_TMPDIR to a folder with room that this user can write, or runtime to local"
            ) from None
        except Exception as error:  # Ray raises a bare Exception
            if "timed out during startup" not in str(error):
                raise
            _end(set(psutil.Process().children(recursive=True)) - others)
            if not tries_left:
                raise WorkerLost(
                    f"Ray did not start in {STARTS} tries: the machine is too busy. End other programs, or set runtime to local"
                ) from None


def _running(processes: Iterable[psutil.Process], but: frozenset[str] = frozenset()) -> list[psutil.Process]:
    running = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE and process.name() not in but:
                running.append(process)
    return running


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=10)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM by one that exits at once; a job has to finish its step first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
