"""Rate limit of images per minute, by API key or client."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from flashdmd_ray.serving.errors import ApiError

MAX_NAMES = 10_000
"""Names whose buckets are kept; the one that was idle longest goes first."""


class RateLimit:
    """Token buckets, one for each name: `per_minute` images in the long run, `burst` after a pause."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> tokens, when they were counted

    def take(self, name: str, images: float) -> None:
        """Take `images` from a name's bucket. Raises ApiError (429, with the seconds to wait) when it holds too few."""
        now = self._clock()
        tokens, counted = self._buckets.pop(name, (self._burst, now))
        tokens = min(self._burst, tokens + (now - counted) * self._rate)
        # More than the burst has to wait for a full bucket, which it then overdraws. Sums of floats may fall just short.
        needed = min(images, self._burst) - 1e-9
        enough = tokens >= needed
        self._buckets[name] = (tokens - images if enough else tokens, now)
        while len(self._buckets) > MAX_NAMES:
            self._buckets.popitem(last=False)
        if not enough:
            wait = math.ceil((needed - tokens) / self._rate)
            raise ApiError(
                429,
                f"Rate limit of {self._rate * 60:g} images per minute reached; try again in {wait} s.",
                "rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
