"""Local runtime: every role in this process, for debugging, tests and machines with one device. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.runtime.border import RoleHere
from flashdmd_ray.runtime.call_times import CallTimes
from flashdmd_ray.runtime.placement import REWARDS
from flashdmd_ray.runtime.protocol import ScalablePool, Task

T = TypeVar("T")

GROUP = "learner"
"""Name of the one process in measurements: the group that all roles join."""


class LocalRuntime:
    """Runtime of role objects in this process.

    Calls that the Ray runtime runs at the same time run here one after the other, with equal results.
    """

    def __init__(self, roles: Mapping[str, Any], rewards: Mapping[str, Any] | None = None) -> None:
        """roles: by the attribute names of `Runtime`; rewards: by pool. A job without preference updates has no rollouts
        and no rewards."""
        self.times = CallTimes()
        self.generator: Any = self._handle(roles, "generator")
        self.score: Any = self._handle(roles, "score")
        self.discriminator: Any = self._handle(roles, "discriminator")
        self.rollouts: Any = self._handle(roles, "rollouts")
        self.rewards: Mapping[str, Any] = {
            pool: RoleHere(GROUP, f"{REWARDS}{pool}", role, self.times) for pool, role in (rewards or {}).items()
        }
        self.pools: Mapping[str, ScalablePool] = {}
        self.step: int | None = None

    def _handle(self, roles: Mapping[str, Any], name: str) -> RoleHere | None:
        return RoleHere(GROUP, name, roles[name], self.times) if name in roles else None

    def publish(self, version: int) -> Task[PublishedWeights]:
        return self.background(lambda: PublishedWeights(version, {}, ""))

    def fetch(self, value: T) -> T:
        return value

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        return [call() for call in calls]

    def background(self, call: Callable[[], T]) -> Task[T]:
        """Run the call at once; an error is kept for `result`, as if it had happened elsewhere."""
        future: Future[T] = Future()
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)
        return future

    def pool_metrics(self) -> dict[str, float]:
        return {}

    def end_attempt(self, newest: int) -> None:
        """Forget the roles, so that there is memory for those of the next attempt."""
        self.generator = self.score = self.discriminator = self.rollouts = None
        self.rewards = {}

    def close(self) -> None:
        """Do nothing: there is only this process."""
