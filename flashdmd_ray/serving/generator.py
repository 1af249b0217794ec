"""The process that draws: all models of the service, one drawing thread, and an asynchronous front for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from PIL import Image
from torch import Tensor

from flashdmd_ray.runtime.environment import limit_threads
from flashdmd_ray.serving.batching import DrawingThread, Job
from flashdmd_ray.serving.catalogue import Version
from flashdmd_ray.serving.images import encode_picture, to_picture
from flashdmd_ray.serving.messages import Drawn, DrawOrder, ModelInfo, Refused
from flashdmd_ray.serving.rehearsal import Rehearsal
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.shelf import Shelf

ImageChecker = Callable[[Image.Image], str | None]
"""image -> None, or why it is withheld."""


class Generator:
    """Plain Python: Serve makes a deployment of it, tests use it as it is."""

    def __init__(self, settings: ServeSettings) -> None:
        """Loads and warms up every model. Raises ValueError for the first that cannot be served."""
        limit_threads(settings.replica.threads)
        self._settings = settings
        self._check: ImageChecker | None = load_hook(settings.image_checker)
        self._thread = DrawingThread(settings.replica.batch)
        self._shelf = Shelf(settings, Rehearsal(settings.replica.batch))
        self._shelf.fill()

    async def models(self) -> Sequence[ModelInfo]:
        """What can be asked for now."""
        return self._shelf.infos()

    async def draw(self, order: DrawOrder) -> Drawn | Refused:
        """Images of one prompt. When the caller is cancelled, drawing stops before the next denoising step."""
        found = self._find(order)
        if isinstance(found, Refused):
            return found
        version, job = found
        self._thread.add(job)
        try:
            pixels = await asyncio.wait_for(asyncio.wrap_future(job.future), order.patience_s)
        except TimeoutError:
            return Refused(504, f"The images were not ready within {order.patience_s:g} s.", "deadline_exceeded")
        encoded = await asyncio.to_thread(self._encode, order, pixels)
        if isinstance(encoded, Refused):
            return encoded
        return Drawn(tuple(encoded), version.version, job.queue_s, job.draw_s, job.batch)

    @property
    def load(self) -> int:
        """Requests that are being drawn or wait."""
        return self._thread.load

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        if not self._thread.alive:
            raise RuntimeError("the drawing thread has ended")

    def _find(self, order: DrawOrder) -> tuple[Version, Job] | Refused:
        found = self._shelf.find(order.model)
        if found is None:
            return Refused(404, f"The model '{order.model}' does not exist.", "model_not_found", "model")
        version, info = found
        # The ingress has checked this against the version that was there a moment ago.
        for param, asked, offered in (
            ("size", order.size, info.sizes),
            ("num_inference_steps", order.steps, info.steps),
        ):
            if asked not in offered:
                return Refused(400, f"Invalid '{param}': {info.name} has another version now.", "invalid_value", param)
        return version, Job(version.artists[order.model], order.prompt, order.seeds, order.steps, order.size)

    def _encode(self, order: DrawOrder, pixels: Tensor) -> list[bytes] | Refused:
        pictures = [to_picture(image) for image in pixels]
        for picture in pictures if self._check is not None else ():
            assert self._check is not None
            if (reason := self._check(picture)) is not None:
                return Refused(400, f"An image was withheld: {reason}", "content_policy_violation", "prompt")
        return [encode_picture(picture, order.image_format, order.quality) for picture in pictures]


def load_hook(path: str | None) -> Any:
    """The operator's function at `module:function`, None for None. Raises ValueError when it cannot be imported."""
    if path is None:
        return None
    module, _, attribute = path.partition(":")
    try:
        hook = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import {path} ({error}); correct prompt_filter or image_checker") from None
    if not callable(hook):
        raise ValueError(f"{path} is no function")
    return hook
