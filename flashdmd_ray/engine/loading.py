"""Starts the ranks of a node without a full copy of the weights in each.

A trained network is handed to its engine as a `skeleton`, which holds no weights, together with a source that rank 0 alone reads. The
engine sends the weights around one parameter at a time; under ZeRO stage 3 a rank keeps its slice of each and never holds more than one
whole parameter.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdmd_ray.engine.processes import local_device, rank, world_size

Source = Mapping[str, Tensor]
"""Weights by parameter name, read one at a time: a `state_dict()`, or `checkpoint.load_tensors`, which maps the file into memory."""


@contextmanager
def in_turn() -> Iterator[None]:
    """Run the block on one rank of each machine at a time.

    Each reads a whole network and sends it to its GPU before the next one reads, so host memory holds one copy at a time. Ranks of
    different machines do not wait for one another's turn. Collective.
    """
    if world_size() == 1:
        yield
        return
    machines: list[str] = [""] * world_size()
    dist.all_gather_object(machines, socket.gethostname())
    mine = machines[: rank()].count(machines[rank()])
    for turn in range(max(machines.count(machine) for machine in machines)):
        try:
            if turn == mine:
                yield
        finally:
            dist.barrier()


def skeleton(module: nn.Module) -> nn.Module:
    """Copy `module` with float32 parameters on the meta device: its structure and buffers without the memory of its weights."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=torch.float32), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def module_device(module: nn.Module) -> torch.device:
    """Device of the network; for a skeleton, the device its weights will be on."""
    real = (p.device for p in module.parameters() if not p.is_meta)
    return next(real, local_device())


@torch.no_grad()
def receive(
    module: nn.Module, source: Source | None, room: Callable[[Tensor], Tensor], keep: Callable[[nn.Parameter], None]
) -> None:
    """Give every rank the parameters and buffers of rank 0, one at a time.

    source: what a skeleton is filled with, read on rank 0 only; None for a network that has its weights already, which are then overwritten
    by those of rank 0. room: memory for a parameter of a skeleton, with its shape and dtype. keep: called with each parameter as soon as
    its weights are there, before the next one arrives.
    """
    for name, p in module.named_parameters():
        if p.is_meta:
            full = arrive(name, room(p), source)
            torch.utils.swap_tensors(p, nn.Parameter(full, requires_grad=p.requires_grad))
        elif world_size() > 1:
            dist.broadcast(p.detach(), src=0)
        keep(p)
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def arrive(name: str, full: Tensor, source: Source | None) -> Tensor:
    """Fill `full` with one parameter from the source of rank 0, on every rank."""
    if rank() == 0:
        assert source is not None, "a skeleton needs a source of weights on rank 0"
        full.copy_(source[name])
    if world_size() > 1:
        dist.broadcast(full, src=0)
    return full
