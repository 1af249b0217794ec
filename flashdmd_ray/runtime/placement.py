"""Worker groups of a job, and the check that a cluster has room for them. No Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from flashdmd_ray.config import Config
from flashdmd_ray.runtime.errors import NoRoom

REWARDS = "rewards/"
"""Before the pool's name in the name of its role."""


@dataclass(frozen=True)
class WorkerGroup:
    """One kind of worker process: the roles that live in it, how many there are, and what each reserves.

    roles: name of the role in `Runtime` -> "module:Class"; "rewards/<pool>" for the rewards of one pool. cpus, gpus: for one worker.
    """

    name: str
    roles: Mapping[str, str]
    workers: int
    cpus: float
    gpus: float
    stateful: bool
    """Trained weights live here: ranks of one group, never restarted alone.

    Otherwise a pool of interchangeable members.
    """
    key: str
    """The setting that places it."""
    config: Config


@dataclass(frozen=True)
class Node:
    """Total resources of one machine of the cluster."""

    cpus: float
    gpus: int


def create_roles(group: WorkerGroup, rank: int, world_size: int) -> dict[str, Any]:
    """Build the roles of one process, in order. Raises what a role raises (ValueError for missing or corrupt weights).

    rank: of a group's worker, or the number of a pool's member, whose world size is 1. A role class is built by
    `from_config(config, rank, world_size)`, or, when its `neighbour` was built before it in this process and shares a network with it,
    by `from_neighbour(role)`. Rewards get a configuration with no others than their pool's.
    """
    roles: dict[str, Any] = {}
    for name, path in group.roles.items():
        kind = role_class(path)
        if (neighbour := getattr(kind, "neighbour", None)) in roles:
            roles[name] = kind.from_neighbour(roles[neighbour])
        else:
            config = group.config.for_pool(name.removeprefix(REWARDS)) if is_reward(name) else group.config
            roles[name] = kind.from_config(config, rank=rank, world_size=world_size)
    return roles


def rewards_of(roles: Mapping[str, Any]) -> dict[str, Any]:
    """The rewards among the roles, or handles of roles, of a job: by pool."""
    return {name.removeprefix(REWARDS): role for name, role in roles.items() if is_reward(name)}


def is_reward(role: str) -> bool:
    """Return True for the name of a role that is the rewards of a pool."""
    return role.startswith(REWARDS)


def check_devices(group: WorkerGroup, assigned: int, visible: int) -> None:
    """Raise ValueError when a worker of the group sees other GPUs than its own; called in the worker.

    assigned: GPUs that Ray gave this process. visible: GPUs that torch sees. A share of a GPU is one GPU, seen by all that
    share it. Ray does not hide GPUs from workers that asked for none: we do, and here is the proof.
    """
    expected = math.ceil(group.gpus)
    if assigned != expected:
        raise ValueError(f"{group.key}.gpus: {group.gpus:g} asked for, but Ray assigned {amount(assigned, 'GPU')}")
    if visible != expected:
        raise ValueError(
            f"{group.key}.gpus: this worker was given {amount(expected, 'GPU')}, but torch sees {visible}; "
            "check the driver and CUDA_VISIBLE_DEVICES on that machine"
        )


def role_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def check_shares(groups: Sequence[WorkerGroup]) -> None:
    """Raise ValueError, naming the setting, for groups that no cluster can place."""
    for group in groups:
        _check_gpu_share(group)


def check_placement(groups: Sequence[WorkerGroup], nodes: Sequence[Node]) -> None:
    """Raise ValueError like `check_shares`; NoRoom when these nodes, empty, cannot hold the groups.

    First fit, largest first: it may refuse a packing that a cleverer search would find, only where the cluster is full
    to the last share.
    """
    check_shares(groups)
    free = [(node.cpus, [1.0] * node.gpus) for node in nodes]
    for group in sorted(groups, key=lambda g: (g.gpus, g.cpus), reverse=True):
        for _ in range(group.workers):
            if not _take(free, group):
                raise NoRoom(_no_room(group, groups, nodes))


def needs_of(groups: Sequence[WorkerGroup]) -> str:
    """Workers of a job and what each reserves, in words."""
    return ", ".join(f"{g.name} {g.workers} x ({amount(g.gpus, 'GPU')}, {amount(g.cpus, 'CPU')})" for g in groups)


def _no_room(group: WorkerGroup, groups: Sequence[WorkerGroup], nodes: Sequence[Node]) -> str:
    gpus, cpus = amount(sum(node.gpus for node in nodes), "GPU"), amount(sum(node.cpus for node in nodes), "CPU")
    return (
        f"{group.key}: a worker with {amount(group.gpus, 'GPU')} and {amount(group.cpus, 'CPU')} finds no room; "
        f"the job needs {needs_of(groups)}, the cluster has {gpus} and {cpus} on {amount(len(nodes), 'node')}; "
        "lower the workers, gpus or cpus of placement, or add machines"
    )


def _check_gpu_share(group: WorkerGroup) -> None:
    if group.gpus > 1 and group.gpus != int(group.gpus):
        raise ValueError(f"{group.key}.gpus: above 1 it must be a whole number, got {group.gpus:g}")
    if group.stateful and group.workers > 1 and 0 < group.gpus < 1:
        raise ValueError(f"{group.key}.gpus: two ranks cannot share a GPU (NCCL refuses); use 1, or one worker")


def _take(free: list[tuple[float, list[float]]], group: WorkerGroup) -> bool:
    tolerance = 1e-6
    for index, (cpus, gpus) in enumerate(free):
        whole = max(1, math.ceil(group.gpus))
        share = min(group.gpus, 1.0)
        chosen = [i for i, left in enumerate(gpus) if left >= share - tolerance][:whole] if group.gpus else []
        if cpus >= group.cpus - tolerance and (not group.gpus or len(chosen) == whole):
            free[index] = (cpus - group.cpus, [left - share if i in chosen else left for i, left in enumerate(gpus)])
            return True
    return False


def amount(number: float, unit: str) -> str:
    """Number and unit, in the plural where it is not one."""
    return f"{number:g} {unit}" + ("" if number == 1 else "s")
