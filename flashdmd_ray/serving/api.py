"""What clients see: routes, error shapes and the OpenAPI document. Draws nothing and imports no Ray: see `Studio`."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.errors import ApiError, error_response
from flashdmd_ray.serving.keys import Doorkeeper
from flashdmd_ray.serving.limits import RateLimit, read_json
from flashdmd_ray.serving.messages import Drawn, DrawOrder, ModelInfo, Refused, size_text
from flashdmd_ray.serving.metrics import Metrics
from flashdmd_ray.serving.middleware import RequestScope, state_of
from flashdmd_ray.serving.openapi import describe_api
from flashdmd_ray.serving.requests import ImageRequest, make_order, parse_request, random_seed
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.site import page_routes

log = logging.getLogger(LOGGER)

PromptFilter = Callable[[str], str | None]
"""prompt -> None, or why it is refused."""


class Studio(Protocol):
    """Whoever draws."""

    async def models(self) -> Sequence[ModelInfo]:
        """What can be drawn with now; raises ApiError (503) before the first is ready."""

    async def draw(self, order: DrawOrder) -> Drawn | Refused:
        """Raises ApiError when nobody can: 429, 503 or 504. Cancelling it stops the drawing."""


def build_api(
    settings: ServeSettings, studio: Studio, keys: Sequence[str], prompt_filter: PromptFilter | None = None
) -> Starlette:
    """The application, for any ASGI server."""
    doorkeeper = Doorkeeper(keys)
    api = Api(settings, studio, doorkeeper.needs_key, prompt_filter)
    routes = [
        Route("/v1/images/generations", api.generate, methods=["POST"]),
        Route("/v1/models", api.list_models, methods=["GET"]),
        Route("/v1/models/{model:path}", api.get_model, methods=["GET"]),
        Route("/healthz", api.health, methods=["GET"]),
        Route("/metrics", api.metrics_page, methods=["GET"]),
        Route("/openapi.json", api.openapi, methods=["GET"]),
        *page_routes(),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestScope, doorkeeper=doorkeeper, metrics=api.metrics)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect would be one more answer to document
    return app


class Api:
    """The routes, over one studio."""

    def __init__(
        self, settings: ServeSettings, studio: Studio, needs_key: bool, prompt_filter: PromptFilter | None
    ) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._studio = studio
        self._needs_key = needs_key
        self._prompt_filter = prompt_filter
        self._inside = 0
        self.metrics = Metrics()
        per_minute = self._limits.images_per_minute
        self._rate = None if per_minute is None else RateLimit(per_minute, self._limits.burst)

    async def generate(self, request: Request) -> Response:
        """Draw images of a prompt."""
        started = time.monotonic()
        tree = await read_json(request, self._limits.body_bytes, self._limits.body_seconds)
        asked = parse_request(tree, self._limits)
        model = await self._find(asked.model)
        order = make_order(asked, model, self._limits, self._settings.deadline_s, random_seed)
        self._admit(request, asked)
        if self._rate is not None:
            self._rate.take(state_of(request).client, len(order.seeds))
        drawn = await while_here(request, self._draw(order))
        return image_response(order, drawn, time.monotonic() - started)

    async def list_models(self, request: Request) -> Response:
        """The models that can be asked for."""
        models = await self._studio.models()
        return json_response({"object": "list", "data": [model_object(model) for model in models]})

    async def get_model(self, request: Request) -> Response:
        """One model, by name or alias."""
        return json_response(model_object(await self._find(request.path_params["model"])))

    async def health(self, request: Request) -> Response:
        """200 when images can be drawn."""
        await self._studio.models()
        return json_response({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return self.metrics.page(await self._studio.models())

    async def openapi(self, request: Request) -> Response:
        """This API as an OpenAPI document, with the models that are there now."""
        return json_response(describe_api(await self._studio.models(), self._settings, self._needs_key))

    async def _find(self, name: str | None) -> ModelInfo:
        wanted = self._settings.default_model if name is None else name
        for model in await self._studio.models():
            if wanted == model.name or wanted in model.aliases:
                return model
        raise ApiError(
            404, f"The model '{wanted[:100]}' does not exist; GET /v1/models lists them.", "model_not_found", "model"
        )

    def _admit(self, request: Request, asked: ImageRequest) -> None:
        """The operator's filter, and a line in the log if the operator wants prompts there."""
        reason = None if self._prompt_filter is None else self._prompt_filter(asked.prompt)
        if reason is not None:
            raise ApiError(400, f"The prompt was refused: {reason}", "content_policy_violation", "prompt")
        if self._settings.log_prompts:
            log.info("request %s: prompt %r", state_of(request).request_id, asked.prompt)

    async def _draw(self, order: DrawOrder) -> Drawn:
        if self._inside >= self._settings.queue:
            raise queue_full()
        try:
            self._count(+1)
            drawn = await asyncio.wait_for(self._studio.draw(order), order.patience_s)
        except TimeoutError:
            message = f"The images were not ready within {order.patience_s:g} s."
            raise ApiError(504, message, "deadline_exceeded") from None
        finally:
            self._count(-1)
        if isinstance(drawn, Refused):
            raise ApiError(drawn.status, drawn.message, drawn.code, drawn.param)
        self.metrics.drawn(order, drawn)
        return drawn

    def _count(self, change: int) -> None:
        self._inside += change
        self.metrics.inside(self._inside)


async def while_here(request: Request, drawing: Coroutine[Any, Any, Drawn]) -> Drawn:
    """What `drawing` gives; it is cancelled when the client leaves. The request's body must have been read. Raises ApiError then."""
    work, leaving = asyncio.create_task(drawing), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(400, "The client went away before its images were drawn.", "client_disconnected")
    finally:
        leaving.cancel()
        work.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def queue_full() -> ApiError:
    message = "The service is busy and its queue is full; try again in a second."
    return ApiError(429, message, "queue_full", headers={"Retry-After": "1"})


def image_response(order: DrawOrder, drawn: Drawn, total_s: float) -> Response:
    """OpenAI's response, the seed of every image, and what made them."""
    images = [
        {"b64_json": base64.b64encode(image).decode(), "seed": seed}
        for image, seed in zip(drawn.images, order.seeds, strict=True)
    ]
    return json_response(
        {
            "created": int(time.time()),
            "data": images,
            "output_format": order.image_format,
            "size": size_text(order.size),
            "model": order.model,
            "version": drawn.version,
            "num_inference_steps": order.steps,
            "timing": {
                "queue_seconds": round(drawn.queue_s, 4),
                "draw_seconds": round(drawn.draw_s, 4),
                "total_seconds": round(total_s, 4),
                "seconds_per_image": round(drawn.draw_s / len(images), 4),
                "batch": drawn.batch,
            },
        }
    )


def model_object(model: ModelInfo) -> dict[str, Any]:
    """OpenAI's model object, and what a client needs to know to ask for images."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "flashdmd_ray",
        "version": model.version,
        "kind": model.kind,
        "base": model.base,
        "aliases": list(model.aliases),
        "sizes": [size_text(size) for size in model.sizes],
        "num_inference_steps": sorted(model.steps),
        "default_num_inference_steps": model.steps[0],
        "guidance_scale": model.guidance_scale,
        "refused": model.refused,
    }


def json_response(tree: Mapping[str, Any]) -> Response:
    return Response(json.dumps(tree), 200, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework itself says: no such page, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(404, f"There is no {request.url.path[:200]}.", "not_found")
    if error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}."
        return error_response(405, message, "method_not_allowed", headers=error.headers)
    return error_response(400, str(error.detail), "invalid_request")  # nothing here raises another one
