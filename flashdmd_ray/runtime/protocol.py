"""What a runtime offers the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from flashdmd_ray.batch import PublishedWeights

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """Work handed to `Runtime.background`."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the value; raises what the work raised."""

    def done(self) -> bool: ...


class Runtime(Protocol):
    """The roles, wherever they run.

    Every attribute below has the methods of its role class (flashdmd_ray/roles) with the same arguments and results.
    Arguments must not be changed by a role, and results must not be changed by the driver: in the local runtime they
    are shared.
    """

    generator: Any
    score: Any
    discriminator: Any
    rollouts: Any
    rewards: Mapping[str, Any]
    """One for each pool of rewards, by its name."""
    step: int | None
    """Set by the driver at the start of each step, so that errors can name it."""

    def publish(self, weights: Mapping[str, Tensor], version: int) -> PublishedWeights:
        """Copy generator weights to where rollout workers can read them. `version` is the step they follow."""

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        """Run independent calls at the same time where there are processes for it; results in order.

        Raises the first error.
        """

    def background(self, call: Callable[[], T]) -> Task[T]:
        """Start a call whose result is wanted later. Errors are raised by `Task.result`."""

    def close(self) -> None:
        """End everything this runtime started. May be called twice."""
