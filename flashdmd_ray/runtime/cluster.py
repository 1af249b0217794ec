"""The Ray cluster a job runs in: the one it was submitted to, or a private one on this machine that lives and dies with the job."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from flashdmd_ray.runtime.placement import Node

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a private cluster. Latents and the weights of a laptop-size generator are all it holds."""

PRIVATE_CPUS = 256
"""CPUs a private cluster claims to have. Ray's CPUs only count reservations; on one machine the operating system shares the cores, and a small
number would make a pool that grows during the run wait for ever."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray. `private`: started here, so `leave` ends all of its processes."""

    private: bool
    joined: bool

    @classmethod
    def join(cls) -> Cluster:
        """Use the Ray this process already talks to, else the cluster of RAY_ADDRESS (set by `ray job submit`), else start a private one."""
        if ray.is_initialized():
            return cls(private=False, joined=False)
        private = "RAY_ADDRESS" not in os.environ
        with _signals_kept():
            if private:
                ray.init(
                    address="local",
                    num_cpus=PRIVATE_CPUS,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    _system_config={"prestart_worker_first_driver": False, "enable_worker_prestart": False},
                )
            else:
                ray.init(logging_level=logging.ERROR)
        return cls(private=private, joined=True)

    def nodes(self) -> list[Node]:
        """What each living machine has in all, whoever uses it now."""
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return [Node(cpus=resources.get("CPU", 0.0), gpus=int(resources.get("GPU", 0))) for resources in alive]

    def leave(self) -> None:
        """Disconnect from a cluster that `join` connected to; a private one ends."""
        if self.joined and ray.is_initialized():
            ray.shutdown()


@contextmanager
def _signals_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM by one that exits at once; a job has to finish its step first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
