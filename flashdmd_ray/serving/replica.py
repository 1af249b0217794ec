"""The process that generates images: all models of the service, one sampling thread, and asynchronous calls to it."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence

from torch import Tensor

from flashdmd_ray.run.variables import prepare_environment
from flashdmd_ray.runtime.environment import limit_threads
from flashdmd_ray.serving.batching import SamplingJob, SamplingThread
from flashdmd_ray.serving.hooks import load_hook
from flashdmd_ray.serving.image_files import encode_image, to_pil
from flashdmd_ray.serving.loaded_models import LoadedModels
from flashdmd_ray.serving.messages import ImageJob, ImageResult, ModelInfo, Rejection
from flashdmd_ray.serving.model_loading import ModelVersion
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.warm_up import WarmUp


class GeneratorReplica:
    """Backend of the API. Plain Python: Serve makes a deployment of it, tests use it as it is."""

    def __init__(self, settings: ServeSettings) -> None:
        """Load and warm up every model. Raises ValueError for the first that cannot be served."""
        prepare_environment(os.environ)
        limit_threads(settings.replica.threads)
        self._check = load_hook(settings.image_checker)
        self._thread = SamplingThread(settings.replica.batch)
        self._models = LoadedModels(settings, WarmUp(settings.replica.batch))
        self._models.load_all()

    async def models(self) -> Sequence[ModelInfo]:
        """List the models that can be asked for now."""
        return self._models.infos()

    async def generate(self, job: ImageJob) -> ImageResult | Rejection:
        """Generate the images of a job. When the caller is cancelled, sampling stops before the next denoising step."""
        prepared = self._prepare(job)
        if isinstance(prepared, Rejection):
            return prepared
        version, sampling = prepared
        expected_s = self._thread.add(sampling, job.timeout_s)
        if expected_s is not None:
            return _too_late(expected_s, job.timeout_s)
        try:
            pixels = await asyncio.wait_for(asyncio.wrap_future(sampling.future), job.timeout_s)
        except TimeoutError:
            return Rejection(504, f"The images were not ready within {job.timeout_s:g} s.", "deadline_exceeded")
        encoded = await asyncio.to_thread(self._encode, job, pixels)
        if isinstance(encoded, Rejection):
            return encoded
        return ImageResult(tuple(encoded), version.version, sampling.queue_s, sampling.sampling_s, sampling.batch)

    @property
    def load(self) -> int:
        """Number of requests in sampling or waiting."""
        return self._thread.load

    def check_health(self) -> None:
        """Raise RuntimeError when the replica is of no use any more; Serve then replaces it."""
        if not self._thread.alive:
            raise RuntimeError("the drawing thread has ended")

    def _prepare(self, job: ImageJob) -> tuple[ModelVersion, SamplingJob] | Rejection:
        loaded = self._models.find(job.model)
        if loaded is None:
            return Rejection(404, f"The model '{job.model}' does not exist.", "model_not_found", "model")
        version, info = loaded
        # The front has checked this against the version that was there a moment ago.
        for param, value, offered in (
            ("size", job.size, info.sizes),
            ("num_inference_steps", job.steps, info.steps),
        ):
            if value not in offered:
                return Rejection(
                    400, f"Invalid '{param}': {info.name} has another version now.", "invalid_value", param
                )
        return version, SamplingJob(version.samplers[job.model], job.prompt, job.seeds, job.steps, job.size, job.client)

    def _encode(self, job: ImageJob, pixels: Tensor) -> list[bytes] | Rejection:
        images = [to_pil(image) for image in pixels]
        for image in images if self._check is not None else ():
            assert self._check is not None
            if (reason := self._check(image.copy())) is not None:
                return Rejection(400, f"An image was withheld: {reason}", "content_policy_violation", "prompt")
        return [encode_image(image, job.image_format, job.quality) for image in images]


def _too_late(expected_s: float, timeout_s: float) -> Rejection:
    message = (
        f"At the present pace this would take about {expected_s:.0f} s, more than the {timeout_s:.0f} s until its deadline; "
        "ask for fewer images or steps, or try again later."
    )
    return Rejection(429, message, "queue_full", retry_after_s=min(60, math.ceil(expected_s - timeout_s)))
