"""The learning rate of each update."""

from __future__ import annotations

from flashdmd_ray.config import RateConfig


def learning_rate(rate: RateConfig, update: int) -> float:
    """The rate of update n = 1, 2, ... of an objective: up to `lr` in the first `warmup`, then, with `decay`, down to `floor` of it.

        r_n = lr n / warmup                                                           n <= warmup
        r_n = lr (1 - f + floor f),   f = min(1, (n - warmup) / (decay - warmup))     n >  warmup

    A function of n and settings alone, so a resumed run goes on where it was, and a run that is made longer does what it did before.
    """
    if update <= rate.warmup:
        return rate.lr * (update / rate.warmup)
    if rate.decay is None:
        return rate.lr
    fallen = min(1.0, (update - rate.warmup) / (rate.decay - rate.warmup))
    return rate.lr * (1.0 - fallen + rate.floor * fallen)
