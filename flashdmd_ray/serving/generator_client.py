"""Calls to the generator replicas: a lost call is made again by another replica, within the request's deadline."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.errors import deadline_exceeded, not_ready, queue_full
from flashdmd_ray.serving.messages import ImageJob, ImageResult, ModelInfo, Rejection

log = logging.getLogger(LOGGER)

FRESH_S = 1.0
"""Age in seconds at which the list of models is asked for again."""
ASK_S = 5.0
"""Seconds for a replica to tell its models."""
STALE_S = 30.0
"""Seconds without any answer of a replica after which the service is not ready, if none answers now."""
PAUSE_S = 0.1
"""Seconds before a lost request is sent again."""


class GeneratorClient:
    """Backend of the API behind a Serve handle. A job always has the same result, so a lost one is simply sent again."""

    def __init__(self, generator: Any) -> None:
        """generator: handle of the deployment."""
        self._generator = generator
        self._models: Sequence[ModelInfo] = ()
        self._asked = -STALE_S
        self._answered = -STALE_S
        self._asking: asyncio.Task[None] | None = None

    async def models(self) -> Sequence[ModelInfo]:
        """List the models: at most FRESH_S old while a replica answers; the last known list for STALE_S more."""
        if time.monotonic() - self._asked > FRESH_S and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())
        if self._asking is not None and (not self._models or self._silent_s > STALE_S):
            await asyncio.shield(self._asking)
        if not self._models or self._silent_s > STALE_S:
            raise not_ready()
        return self._models

    @property
    def _silent_s(self) -> float:
        return time.monotonic() - self._answered

    async def _ask(self) -> None:
        try:
            self._models = await asyncio.wait_for(_response(self._generator.models.remote()), ASK_S)
            self._asked = self._answered = time.monotonic()
        except (RayError, BackPressureError, DeploymentUnavailableError, TimeoutError) as error:
            log.warning("no replica told its models (%s)", type(error).__name__)

    async def generate(self, job: ImageJob) -> ImageResult | Rejection:
        """Generate images by any replica. Raises ApiError.

        429 when all queues are full, 503 when Serve has given the replicas up, 504 after the job's timeout.
        """
        deadline = time.monotonic() + job.timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise deadline_exceeded(job.timeout_s)
            try:
                result: ImageResult | Rejection = await _response(
                    self._generator.generate.remote(dataclasses.replace(job, timeout_s=left))
                )
                self._answered = time.monotonic()
                return result
            except BackPressureError:
                raise queue_full() from None
            except DeploymentUnavailableError:
                raise not_ready() from None
            except RayTaskError:
                raise  # a defect: it would come back
            except RayError as error:
                log.warning("a replica was lost (%s); its request is sent again", type(error).__name__)
                await asyncio.sleep(PAUSE_S)


async def _response(call: Any) -> Any:
    """Wait for a replica's answer. Cancelling this cancels the call there."""
    try:
        return await call
    except asyncio.CancelledError:
        call.cancel()
        raise
