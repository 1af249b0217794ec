"""The cost of a network's uses, from a table of measured ones, or measured now."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flashdmd_ray.plan.specs import Spec, key_of
from flashdmd_ray.run.messages import one_line

TABLE = Path(__file__).with_name("costs.json")
"""Spec key -> {"spec", "cost"}: those of the presets and of all that `flashdmd config new` writes for published teachers.
`python benchmarks/plan_costs.py` measured them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """A quantity of a call on n samples: constant + slope n."""

    constant: float
    slope: float

    def __call__(self, samples: float, calls: float = 1) -> float:
        """Price of `calls` calls on so many samples in all: bytes of one call, or operations."""
        return calls * self.constant + samples * self.slope if samples else 0.0


@dataclass(frozen=True)
class Use:
    """flops: operations, two for each multiply-add. kept, peak: bytes between forward and backward, and at most. launches: kernels."""

    flops: Line
    kept: Line
    peak: Line
    launches: Line


@dataclass(frozen=True)
class Cost:
    """parameters: of the network. trained: of those that get gradients. uses: by what is done with it."""

    parameters: int
    trained: int
    uses: Mapping[str, Use]


def cost_of(spec: Spec | None) -> Cost | None:
    """None for an unknown architecture. One that is not in the table is measured, which imports torch and takes seconds to a minute."""
    return None if spec is None else _cost(key_of(spec), json.dumps(spec))


def known_cost(spec: Spec | None) -> Cost | None:
    """As `cost_of`, from the table alone."""
    entry = None if spec is None else table().get(key_of(spec))
    return None if entry is None else _read(entry["cost"])


@lru_cache(maxsize=64)
def _cost(key: str, spec: str) -> Cost:
    entry = table().get(key)
    if entry is not None:
        return _read(entry["cost"])
    log.warning("measuring a %s that is not in the table of costs: up to a minute or two", json.loads(spec)["kind"])
    from flashdmd_ray.plan.measure import measure

    try:
        return _read(measure(json.loads(spec)))
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"the {json.loads(spec)['kind']} that the config.json files describe cannot be put together: {one_line(error)}; "
            "choose models that belong together"
        ) from None


@lru_cache(maxsize=1)
def table() -> Mapping[str, Any]:
    """The table as it is in the file."""
    entries: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return entries


def _read(cost: Mapping[str, Any]) -> Cost:
    uses = {
        name: Use(*(Line(*use[figure]) for figure in ("flops", "kept", "peak", "launches")))
        for name, use in cost["uses"].items()
    }
    return Cost(cost["parameters"], cost["trained"], uses)
