"""Cost of one network, without its weights: floating-point operations and memory, observed on torch's meta device.

`flashdmd_ray.plan` asks for this only when an architecture is not in its table: it needs torch, and some seconds.
"""

from __future__ import annotations

from flashdmd_ray.plan.measure.networks import measure

__all__ = ["measure"]
