"""Warn when beta and the reference policy have no effect on the preference updates."""

from __future__ import annotations

import logging
from collections import deque
from statistics import fmean

from flashdmd_ray.batch import Metrics
from flashdmd_ray.training.observer import Observer

log = logging.getLogger(__name__)

INERT = 0.05
"""Mean |beta H| below which -logsigmoid(beta H) is a straight line, whose gradient holds neither beta nor the reference policy."""
STEPS = 20
"""Steps with preference updates in the mean; in as many before them H is still small, because the generator has just left the reference."""


class BetaCheck(Observer):
    """Watches `preference/beta_h` of the steps of one attempt."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._seen: deque[float] = deque(maxlen=2 * STEPS)
        self._warned = False

    def after_step(self, done: int, metrics: Metrics) -> None:
        if (warning := self.observe(metrics)) is not None:
            log.warning(warning)

    def observe(self, metrics: Metrics) -> str | None:
        """Take the figures of a step; returns a warning, once, when |beta H| has stayed below INERT."""
        value = metrics.get("preference/beta_h")
        if value is None or self._warned:
            return None
        self._seen.append(value)
        recent = list(self._seen)[STEPS:]
        if len(recent) < STEPS or fmean(recent) >= INERT:
            return None
        self._warned = True
        return (
            f"preference.beta: |beta H| is {fmean(recent):.2g} over {STEPS} steps (it acts at 0.3 to 3), so beta {self._beta:g} and the "
            "reference policy do nothing; raise preference.beta"
        )
