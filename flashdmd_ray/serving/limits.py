"""How much of a body is read, and how fast a key may ask."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from flashdmd_ray.serving.errors import ApiError

READ_AND_FORGET = 32 * 2**20
"""Of a body that is too large: most clients read an answer only after they have sent everything."""
REMEMBERED = 10_000
"""Names whose buckets are kept; the one that was idle longest goes first."""


async def read_json(request: Request, limit: int, patience_s: float) -> Mapping[str, Any]:
    """The body as a JSON object. Raises ApiError for anything else: too large, too slow, of another type, not strict JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = await asyncio.wait_for(_read(request, limit), patience_s)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {patience_s:g} s.", "body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client went away before its body had arrived.", "client_disconnected") from None
    if kind != "application/json":
        raise ApiError(415, "Send the body as JSON, with the header Content-Type: application/json", "not_json")
    return parse_object(body)


async def _read(request: Request, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > READ_AND_FORGET:
            break
    if size > limit:
        raise ApiError(413, f"The body is larger than {limit} bytes.", "body_too_large")
    return b"".join(chunks)


def parse_object(body: bytes) -> Mapping[str, Any]:
    """Strict JSON: UTF-8, no NaN or Infinity. Raises ApiError when it is no object."""
    try:
        tree = json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not valid JSON.", "invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


class RateLimit:
    """A token bucket for each name: `per_minute` images in the long run, `burst` after a pause."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / 60
        self._burst = float(burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # name -> tokens, when they were counted

    def take(self, name: str, images: int) -> None:
        """Count `images`. Raises ApiError (429, with the time to wait) when they are too many now, or at any time."""
        now = self._clock()
        tokens, counted = self._buckets.pop(name, (self._burst, now))
        tokens = min(self._burst, tokens + (now - counted) * self._rate)
        # More than the burst has to wait for a full bucket, which it then overdraws. Sums of floats may fall just short.
        wanted = min(float(images), self._burst) - 1e-9
        enough = tokens >= wanted
        self._buckets[name] = (tokens - images if enough else tokens, now)
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        if not enough:
            wait = math.ceil((wanted - tokens) / self._rate)
            raise ApiError(
                429,
                f"Rate limit of {self._rate * 60:g} images per minute reached; try again in {wait} s.",
                "rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )
