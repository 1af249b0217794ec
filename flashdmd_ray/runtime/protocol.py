"""Interface between the driver and the runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from flashdmd_ray.batch import PublishedWeights
from flashdmd_ray.runtime.call_times import CallTimes
from flashdmd_ray.runtime.usage import PoolState

if TYPE_CHECKING:  # the types of the handles: an editor jumps from the loop to the role
    from flashdmd_ray.roles.discriminator import Discriminator
    from flashdmd_ray.roles.generator import Generator
    from flashdmd_ray.roles.reward import Reward
    from flashdmd_ray.roles.rollout import Rollout
    from flashdmd_ray.roles.score_estimator import ScoreEstimator

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """Work handed to `Runtime.background`."""

    def result(self, timeout: float | None = None) -> T_co:
        """Wait for the value; raises what the work raised."""

    def done(self) -> bool: ...


class ScalablePool(Protocol):
    """A pool as someone sees it who watches the job."""

    def state(self) -> PoolState: ...

    def resize(self, workers: int) -> None:
        """Raises ValueError, one line, for a size that cannot be had."""


class Runtime(Protocol):
    """The roles, wherever they run.

    Each attribute is the role itself (one process) or a handle that has the methods of its class, with the same arguments and results.
    Arguments must not be changed by a role, and results must not be changed by the driver: in the local runtime they
    are shared.
    """

    generator: Generator
    score: ScoreEstimator
    discriminator: Discriminator
    rollouts: Rollout
    rewards: Mapping[str, Reward]
    """One for each pool of rewards, by its name."""
    pools: Mapping[str, ScalablePool]
    """The pools that can be looked at and resized while the job runs, by name: "rollout" and those of rewards. Empty in
    one process."""
    times: CallTimes
    """Time and memory of the calls of this attempt."""
    step: int | None
    """Set by the driver at the start of each step, so that errors can name it."""

    def publish(self, version: int) -> Task[PublishedWeights]:
        """Copy the generator's weights, as they are now, to where rollout workers can read them. `version` is the step they follow.

        Nothing is copied for rollouts that live beside the generator: their calls must end before it is updated.
        """

    def fetch(self, value: T) -> T:
        """Bring what workers made into the driver: `value` with tensors in place of its StoredRows."""

    def parallel(self, *calls: Callable[[], Any]) -> list[Any]:
        """Run independent calls at the same time where there are processes for it; results in order.

        Raises the first error.
        """

    def background(self, call: Callable[[], T]) -> Task[T]:
        """Start a call whose result is wanted later. Errors are raised by `Task.result`."""

    def pool_metrics(self) -> dict[str, float]:
        """pool/<name>/<figure> of every pool since the last call, see `Usage.take_figures`; none in one process."""

    def end_attempt(self, newest: int) -> None:
        """End every call of the attempt, and what cannot go on in the runtime that is built next.

        newest: step of the checkpoint that all roles will be loaded from; with 0 there is none, so nothing that was trained is kept.
        """

    def close(self) -> None:
        """End everything this runtime started. May be called twice."""
