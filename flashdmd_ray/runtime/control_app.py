"""The two calls of a job's control server. Imports FastAPI, so `control` imports this only where it serves."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictInt
from starlette.exceptions import HTTPException

from flashdmd_ray.config import suggestion
from flashdmd_ray.runtime.protocol import ScalablePool

log = logging.getLogger(__name__)

LARGEST_BODY = 16 * 2**10
Sizes = dict[str, Annotated[StrictInt, Field(le=100_000)]]


def build_app(pools: Mapping[str, ScalablePool], token: str) -> FastAPI:
    """Make the application that answers GET /pools and PUT /pools.

    Every refusal is {"error": one line}: 400 for a body that is no JSON, 401 without the token, 404 for an unknown pool,
    409 for a size that cannot be had, 413 for a long body, 422 for one that does not map names to whole numbers.
    """
    app = FastAPI(title="flashdmd_ray pools", docs_url=None, redoc_url=None, openapi_url=None)
    expected = f"Bearer {token}".encode()

    @app.middleware("http")
    async def only_the_owner(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            return _refused(401, "a bearer token is needed: it is in control.json of the run folder")
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdecimal() or int(length) > LARGEST_BODY:
            return _refused(413, f"the body must have a stated length of at most {LARGEST_BODY} bytes")
        return await answer(request)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return _refused(422, f"expected names of pools with whole numbers of workers ({error.errors()[0]['msg']})")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:
            return _refused(400, "the body is not valid JSON")
        return _refused(
            error.status_code, f"there are GET /pools and PUT /pools, not {request.method} {request.url.path}"
        )

    @app.get("/pools")
    def look() -> dict[str, dict[str, Any]]:
        return {name: asdict(pool.state()) for name, pool in pools.items()}

    @app.put("/pools", response_model=None)
    def resize(sizes: Annotated[Sizes, Body()]) -> Response | dict[str, dict[str, Any]]:
        for name in sizes:
            if name not in pools:
                return _refused(404, f"no pool '{name}'{suggestion(name, list(pools))}; there are {', '.join(pools)}")
        for name, workers in sizes.items():
            try:
                pools[name].resize(workers)
            except ValueError as error:
                return _refused(409, str(error))
            log.info("%s: resized by hand to %d workers", name, workers)
        return look()

    return app


def _refused(status: int, text: str) -> Response:
    return JSONResponse({"error": " ".join(text.split())}, status)
