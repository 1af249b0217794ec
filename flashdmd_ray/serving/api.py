"""HTTP API: routes, answers and errors, over any `ImageBackend`. Imports no Ray."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flashdmd_ray.config import suggestion
from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.admission import Admission
from flashdmd_ray.serving.api_keys import ApiKeys
from flashdmd_ray.serving.errors import ApiError, deadline_exceeded, error_response
from flashdmd_ray.serving.hooks import Hook
from flashdmd_ray.serving.image_request import cost, make_job, parse_request, random_seed
from flashdmd_ray.serving.messages import ImageJob, ImageResult, ModelInfo, Rejection, size_text
from flashdmd_ray.serving.metrics import Metrics
from flashdmd_ray.serving.middleware import RequestScope, state_of
from flashdmd_ray.serving.openapi import describe_api
from flashdmd_ray.serving.rate_limit import RateLimit
from flashdmd_ray.serving.request_body import read_json
from flashdmd_ray.serving.settings import ServeSettings
from flashdmd_ray.serving.static_page import page_routes

log = logging.getLogger(LOGGER)


class ImageBackend(Protocol):
    """Backend that generates images for a job."""

    async def models(self) -> Sequence[ModelInfo]:
        """List the models that can be asked for now. Raises ApiError (503) before the first is ready."""

    async def generate(self, job: ImageJob) -> ImageResult | Rejection:
        """Generate the images of a job. Raises ApiError: 429, 503 or 504. Cancelling it stops the sampling."""


def build_api(
    settings: ServeSettings, backend: ImageBackend, keys: Sequence[str], prompt_filter: Hook | None = None
) -> Starlette:
    """Make the application, for any ASGI server."""
    api_keys = ApiKeys(keys, settings.cors_origins)
    api = Api(settings, backend, api_keys.needs_key, prompt_filter)
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
        middleware=[*_cors(settings.cors_origins), Middleware(RequestScope, api_keys=api_keys, metrics=api.metrics)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect would be one more answer to document
    return app


def _cors(origins: Sequence[str]) -> list[Middleware]:
    """Let browsers show answers to pages of these origins; no cookies are involved."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["X-Request-Id", "Retry-After", "OpenAI-Processing-Ms"],
        )
    ]


class Api:
    """Handlers of the routes, over one backend."""

    def __init__(
        self, settings: ServeSettings, backend: ImageBackend, needs_key: bool, prompt_filter: Hook | None
    ) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._backend = backend
        self._needs_key = needs_key
        self._prompt_filter = prompt_filter
        self._admission = Admission(settings.queue, settings.limits.teacher_share)
        self.metrics = Metrics()
        per_minute = self._limits.images_per_minute
        self._rate = None if per_minute is None else RateLimit(per_minute, self._limits.burst)

    async def generate(self, request: Request) -> Response:
        """Generate images of a prompt."""
        started = time.monotonic()
        tree = await read_json(request, self._limits.body_bytes, self._limits.body_seconds)
        fields = parse_request(tree, self._limits)
        model = await self._find(fields.model)
        client = state_of(request).client
        job = make_job(fields, model, client, self._limits, self._settings.deadline_s, random_seed)
        self._filter(request, fields.prompt)
        if self._rate is not None:
            self._rate.take(client, cost(job, model))
        result = await unless_disconnected(request, self._generate(job, model.kind == "teacher"))
        return image_response(job, result, time.monotonic() - started)

    async def list_models(self, request: Request) -> Response:
        """List the models that can be asked for."""
        models = await self._backend.models()
        return json_response({"object": "list", "data": [model_object(model) for model in models]})

    async def get_model(self, request: Request) -> Response:
        """Show one model, by name or alias."""
        return json_response(model_object(await self._find(request.path_params["model"])))

    async def health(self, request: Request) -> Response:
        """Answer 200 when images can be generated."""
        await self._backend.models()
        return json_response({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        """Show the figures for Prometheus."""
        return self.metrics.page(await self._backend.models())

    async def openapi(self, request: Request) -> Response:
        """Describe this API as an OpenAPI document, with the models that are there now."""
        return json_response(describe_api(await self._backend.models(), self._settings, self._needs_key))

    async def _find(self, name: str | None) -> ModelInfo:
        name = self._settings.default_model if name is None else name
        known = {known: model for model in await self._backend.models() for known in (model.name, *model.aliases)}
        if name in known:
            return known[name]
        meant = suggestion(name[:100], list(known))
        raise ApiError(
            404,
            f"The model '{name[:100]}' does not exist{meant or '; GET /v1/models lists them.'}",
            "model_not_found",
            "model",
        )

    def _filter(self, request: Request, prompt: str) -> None:
        """Apply the operator's filter, and log the prompt if the operator wants prompts in the log."""
        reason = None if self._prompt_filter is None else self._prompt_filter(prompt)
        if reason is not None:
            raise ApiError(400, f"The prompt was refused: {reason}", "content_policy_violation", "prompt")
        if self._settings.log_prompts:
            log.info("request %s: prompt %r", state_of(request).request_id, prompt)

    async def _generate(self, job: ImageJob, teacher: bool) -> ImageResult:
        try:
            with self._admission.place(job.client, teacher):
                self.metrics.set_inside(self._admission.inside)
                result = await asyncio.wait_for(self._backend.generate(job), job.timeout_s)
        except TimeoutError:
            raise deadline_exceeded(job.timeout_s) from None
        finally:
            self.metrics.set_inside(self._admission.inside)
        if isinstance(result, Rejection):
            headers = {} if result.retry_after_s is None else {"Retry-After": str(result.retry_after_s)}
            raise ApiError(result.status, result.message, result.code, result.param, headers)
        self.metrics.record_result(job, result)
        return result


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, ImageResult]) -> ImageResult:
    """Return the result of `work`, which is cancelled when the client leaves. Raises ApiError (400) then.

    The request's body must have been read.
    """
    task, leaving = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(400, "The client went away before its images were result.", "client_disconnected")
    finally:
        leaving.cancel()
        task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def image_response(job: ImageJob, result: ImageResult, total_s: float) -> Response:
    """Make OpenAI's response, with the seed of every image, and what made them."""
    images = [
        {"b64_json": base64.b64encode(image).decode(), "seed": seed}
        for image, seed in zip(result.images, job.seeds, strict=True)
    ]
    return json_response(
        {
            "created": int(time.time()),
            "data": images,
            "output_format": job.image_format,
            "size": size_text(job.size),
            "model": job.model,
            "version": result.version,
            "num_inference_steps": job.steps,
            "timing": {
                "queue_seconds": round(result.queue_s, 4),
                "draw_seconds": round(result.sampling_s, 4),
                "total_seconds": round(total_s, 4),
                "seconds_per_image": round(result.sampling_s / len(images), 4),
                "batch": result.batch,
            },
        }
    )


def model_object(model: ModelInfo) -> dict[str, Any]:
    """Make OpenAI's model object, with what a client needs to know to ask for images."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "flashdmd_ray",
        "version": model.version,
        "kind": model.kind,
        "base": model.base,
        "aliases": list(model.aliases),
        "examples": list(model.examples),
        "sizes": [size_text(size) for size in model.sizes],
        "num_inference_steps": sorted(model.steps),
        "default_num_inference_steps": model.steps[0],
        "guidance_scale": model.guidance_scale,
        "refused": model.refused,
    }


def json_response(tree: Mapping[str, Any]) -> Response:
    """Make an answer 200 with a JSON body."""
    return Response(json.dumps(tree), 200, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Put the framework's own errors in OpenAI's shape: no such page, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        path = request.url.path[:200]
        meant = suggestion(path, ["/v1/images/generations", "/v1/models", "/healthz"])
        return error_response(404, f"There is no {path}{meant or '.'}", "not_found")
    if error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}."
        return error_response(405, message, "method_not_allowed", headers=error.headers)
    return error_response(400, str(error.detail), "invalid_request")  # nothing here raises another one
