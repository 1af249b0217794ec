"""Reading of a request's body: bounded in bytes and seconds, strict JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from flashdmd_ray.run.json_text import unique_names
from flashdmd_ray.serving.errors import ApiError

MAX_DISCARDED = 32 * 2**20
"""Bytes of a body that is too large that are read all the same: most clients read an answer only after they have sent everything."""


async def read_json(request: Request, limit: int, timeout_s: float) -> Mapping[str, Any]:
    """Read the body, a JSON object of at most `limit` bytes. Raises ApiError: 408, 413, 415, or 400 for anything but strict JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = await asyncio.wait_for(_read(request, limit), timeout_s)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {timeout_s:g} s.", "body_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client went away before its body had arrived.", "client_disconnected") from None
    if media_type != "application/json":
        raise ApiError(415, "Send the body as JSON, with the header Content-Type: application/json", "not_json")
    return parse_object(body)


async def _read(request: Request, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > MAX_DISCARDED:
            break
    if size > limit:
        raise ApiError(413, f"The body is larger than {limit} bytes.", "body_too_large")
    return b"".join(chunks)


def parse_object(body: bytes) -> Mapping[str, Any]:
    """Parse strict JSON: UTF-8, with or without a byte order mark, no NaN or Infinity, no name twice.

    Raises ApiError (400) when it is no object.
    """
    try:
        tree = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {_why(error)}.", "invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return tree


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _why(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
