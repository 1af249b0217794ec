"""GPUs that are there are used: the placement of a configuration that leaves it open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.plan.fit import GIB
from flashdmd_ray.plan.forecast import gpus_of
from flashdmd_ray.plan.hardware import gpu_named
from flashdmd_ray.run.variables import ray_address

DRIVER = Path("/proc/driver/nvidia")
RESERVE_GIB = 0.5
"""GiB of a GPU's memory that are left to the driver and to other programs."""


def use_gpus(config: Config) -> tuple[Config, str]:
    """Place the roles on the GPUs of this machine, or of the cluster that the job joins; see `placed_on`. Waits for that cluster."""
    address = ray_address(os.environ)
    if config.runtime == "ray" and address is not None:
        from flashdmd_ray.runtime.environment import use_loopback

        use_loopback(os.environ)
        from flashdmd_ray.runtime.cluster import gpus_of_cluster

        known = [gpu_named(kind) for kind in gpus_of_cluster(address)]
        return placed_on(config, [None if gpu is None else gpu.gib for gpu in known], "in the cluster")
    if not DRIVER.exists() and shutil.which("nvidia-smi") is None:  # torch need not be imported to know
        return config, ""
    from flashdmd_ray.plan.measure.device import gpu_memories

    return placed_on(config, [size / GIB for size in gpu_memories()], "found")


def placed_on(config: Config, memories: Sequence[float | None], where: str) -> tuple[Config, str]:
    """The configuration with its roles on these GPUs, unless its placement says otherwise, and a line about it; "" without GPUs.

    memories: GiB of each; None where it is not known. Ranks must share the batches equally, so some GPUs may stay free.
    """
    if not memories:
        return config, ""
    there = f"{len(memories)} GPU{'s' if len(memories) > 1 else ''} {where}"
    placement = config.placement
    if placement.is_laid_out:
        used = ", ".join(f"{group} {gpus:g}" for group, gpus in gpus_of(config).items())
        return config, f"{there}, used so: {used}" if used else f"{there}, none used: placement asks for none"
    wanted = len(memories) if placement.gpus == "auto" else min(placement.gpus, len(memories))
    if not wanted:
        return config, f"{there}, none used: placement.gpus is 0"
    if config.runtime == "local":
        return _laid_out(config, 1, memories), f"{there}, used so: 1 by the one process of runtime 'local'"
    ranks, chosen = next(_shared(config, wanted, memories))
    why = "" if ranks == wanted else f"; {wanted} ranks could not share the batches equally"
    return chosen, f"{there}, used so: a learner on each of {ranks}, with all other roles within{why}"


def _shared(config: Config, wanted: int, memories: Sequence[float | None]) -> Iterator[tuple[int, Config]]:
    """Numbers of ranks that can share the configuration's batches, the most first, and the placement on so many."""
    for ranks in range(wanted, 0, -1):
        try:
            yield ranks, _laid_out(config, ranks, memories)
        except ValueError:
            continue


def _laid_out(config: Config, ranks: int, memories: Sequence[float | None]) -> Config:
    known = [memory for memory in memories if memory is not None]
    room = round(min(known) - RESERVE_GIB, 1) if known else None
    tree = config.model_dump(mode="json")
    tree["placement"]["learner"] |= {
        "workers": ranks,
        "gpus": 1,
        "gpu_memory_gib": tree["placement"]["learner"]["gpu_memory_gib"] or room,
    }
    for group in ("discriminator", "rollout", "reward"):
        tree["placement"][group]["within"] = "learner"
    return parse_config(tree)
