"""Gang scheduling: one reservation of Ray for all workers of a job, so that it starts with all of them or waits with none."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from flashdmd_ray.runtime.errors import NoRoom
from flashdmd_ray.runtime.placement import WorkerGroup, amount, needs_of

log = logging.getLogger(__name__)

LOOK_S = 2
"""Seconds between two looks at a reservation that waits."""
SAY_S = 30.0
"""Seconds between two lines about one that waits."""


class Places:
    """Reserved places of one worker group, each for one worker. Safe for threads."""

    def __init__(self, reservation: Any, indices: Sequence[int]) -> None:
        self._reservation = reservation
        self._free = list(reversed(indices))
        self._lock = threading.Lock()

    def take(self) -> int | None:
        """A free place; None when all are taken: a worker that joins later asks Ray for room of its own."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_back(self, place: int | None) -> None:
        """Let another worker have the place as soon as Ray has ended its worker."""
        if place is not None:
            with self._lock:
                self._free.append(place)

    def options(self, place: int | None) -> dict[str, Any]:
        """Options of an actor in that place."""
        if place is None:
            return {}
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._reservation, place, placement_group_capture_child_tasks=False
            )
        }


class Gang:
    """Places for all workers of a job, reserved at once and kept until `release`: what is built anew finds its place again.

    Ray packs them onto as few machines as it can, those with GPUs first, so that ranks are neighbours. When a machine is lost it looks
    for others for the places there; an autoscaler sees what a waiting job needs.
    """

    def __init__(self, groups: Sequence[WorkerGroup]) -> None:
        """Ask for the places; returns at once."""
        self._groups = groups
        bundles: list[dict[str, float]] = []
        indices: dict[str, range] = {}
        for group in groups:
            indices[group.name] = range(len(bundles), len(bundles) + group.workers)
            resources = {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {})
            bundles += [resources] * group.workers
        self._reservation = placement_group(bundles, strategy="PACK")
        self.places = {name: Places(self._reservation, mine) for name, mine in indices.items()}

    def wait(self, timeout_s: float, say: Callable[[str], None]) -> None:
        """Wait until all places are reserved, and say what is missing. Raises NoRoom after `timeout_s`."""
        began, said = time.monotonic(), -SAY_S
        while not self._reservation.wait(LOOK_S):
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise NoRoom(f"no room within {timeout_s:g} s (deadlines.start_s): {self._missing()}")
            if waited - said >= SAY_S:
                say(f"waiting for room: {self._missing()}")
                said = waited

    def _missing(self) -> str:
        there, free = ray.cluster_resources(), ray.available_resources()
        have = " and ".join(f"{free.get(kind, 0):g} of {amount(there.get(kind, 0), kind)}" for kind in ("GPU", "CPU"))
        machines = amount(sum(node["Alive"] for node in ray.nodes()), "machine")
        return f"the job needs {needs_of(self._groups)}; free are {have} on {machines}"

    def release(self) -> None:
        """Give all places back; workers that are still there end."""
        remove_placement_group(self._reservation)
