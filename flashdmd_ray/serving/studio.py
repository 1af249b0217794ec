"""The generator replicas as the ingress sees them: lost ones are replaced by others, within the request's deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.api import queue_full
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.messages import Drawn, DrawOrder, ModelInfo, Refused

log = logging.getLogger(LOGGER)

FRESH_S = 1.0
"""How old the list of models may be."""
ASK_S = 5.0
"""For a replica to tell its models."""
STALE_S = 30.0
"""No replica has answered anything for so long, and now none does: there is none that could draw."""
PAUSE_S = 0.1
"""Before a lost request is sent again."""


class RayStudio:
    """Requests are pure functions of their order, so one that was lost is simply made again."""

    def __init__(self, generator: Any) -> None:
        """generator: handle of the deployment."""
        self._generator = generator
        self._models: Sequence[ModelInfo] = ()
        self._asked = -STALE_S
        self._answered = -STALE_S
        self._asking: asyncio.Task[None] | None = None

    async def models(self) -> Sequence[ModelInfo]:
        """At most FRESH_S old while a replica answers; the last known list for STALE_S more."""
        if time.monotonic() - self._asked > FRESH_S and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and (not self._models or self._silent_s > STALE_S):
            await asyncio.shield(self._asking)
        if not self._models or self._silent_s > STALE_S:
            message = "No replica is ready to draw; try again in a few seconds."
            raise ApiError(503, message, "not_ready", headers={"Retry-After": "5"})
        return self._models

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._answered

    async def _ask(self) -> None:
        try:
            self._models = await asyncio.wait_for(_answer(self._generator.models.remote()), ASK_S)
            self._asked = self._answered = time.monotonic()
        except (RayError, BackPressureError, TimeoutError) as error:
            log.warning("no replica told its models (%s)", type(error).__name__)

    async def draw(self, order: DrawOrder) -> Drawn | Refused:
        give_up = time.monotonic() + order.patience_s
        while True:
            left = give_up - time.monotonic()
            if left <= 0:
                raise ApiError(504, f"The images were not ready within {order.patience_s:g} s.", "deadline_exceeded")
            try:
                drawn: Drawn | Refused = await _answer(
                    self._generator.draw.remote(dataclasses.replace(order, patience_s=left))
                )
                self._answered = time.monotonic()
                return drawn
            except BackPressureError:
                raise queue_full() from None
            except RayTaskError:
                raise  # a defect: it would come back
            except RayError as error:
                log.warning("a replica was lost (%s); its request is sent again", type(error).__name__)
                await asyncio.sleep(PAUSE_S)


async def _answer(response: Any) -> Any:
    """What a replica answers. Cancelling this cancels the call there."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
