"""Process group in which the ranks of a worker group train together."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

BACKLOG = 1024
"""Connections that may wait for rank 0 to accept them."""


def init_process_group(
    rank: int,
    world_size: int,
    address: str = "127.0.0.1",
    port: int = 0,
    timeout_s: float = 600.0,
    listener: socket.socket | None = None,
) -> None:
    """Join the default process group of torch.distributed: NCCL where this process sees a GPU, gloo otherwise.

    Rank 0 listens on `address`:`port`; every rank passes the same two. listener: a socket of rank 0 that listens there already, so that
    nobody else can have taken the port; it is used up. A group of one rank opens no port. A rank that waits longer than
    `timeout_s` seconds for the others, here or in a collective, raises. Raises ValueError for a rank outside the group or a missing port.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of a group of {world_size}")
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        return
    if port <= 0:
        raise ValueError(
            f"a group of {world_size} ranks needs a port on {address} that rank 0 can listen on; see free_port"
        )
    if address.startswith("127.") and "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens on whatever the host name resolves to
    # TCPStore by itself would listen on every interface.
    opened = (listener or socket.create_server((address, port), backlog=BACKLOG)).detach() if rank == 0 else None
    store = dist.TCPStore(address, port, world_size, rank == 0, timeout, master_listen_fd=opened)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port nobody listens on at this moment."""
    with socket.create_server((address, 0)) as probe:
        return int(probe.getsockname()[1])


def world_size() -> int:
    """Return the number of ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def placed_device(gpus: float, key: str) -> torch.device:
    """Device of a process that was given so many GPUs: the first that it sees, or the CPU for none. key: where they are asked for.

    Raises ValueError when torch sees no GPU.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"{key}: {gpus:g} asked for, but torch sees no GPU in this process; "
            "set it to 0, or check the driver and CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", 0)


def local_device() -> torch.device:
    """Return the device of this process: the GPU it sees, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
