"""A dry step's findings: operations and memory of every part and process, and the time of every call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A part's share of a mean step on one rank. flops: operations. peak: bytes of activations at most in one of its calls.
    before: operations of a mean step before `preference.start_step`."""

    part: str
    group: str
    flops: float
    peak: float
    before: float = 0.0


@dataclass(frozen=True)
class RoleTime:
    """A method of a role in a mean step. calls: how many. seconds: of all of them, on the rank or worker that makes them."""

    group: str
    call: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Predicted time of a mean step, from `preference.start_step` on. before: seconds of an earlier step, 0 without any.
    busy: by group, its share of the step at work. critical: calls on the critical path, longest first."""

    seconds: float
    before: float
    times: Sequence[RoleTime]
    busy: Mapping[str, float]
    critical: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Step:
    """A mean step of a configuration. peaks: the most activations of one process, in bytes, by group; "local" for runtime 'local'."""

    works: Sequence[Work]
    peaks: Mapping[str, float]
    timing: Timing | None
    published: float
    """Bytes of the weights that go to the rollout workers before a step with preference updates."""
