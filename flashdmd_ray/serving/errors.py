"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

INVALID, LIMITED, FAILED = "invalid_request_error", "rate_limit_error", "server_error"

ERRORS: Mapping[int, str] = {
    400: "The request is malformed, or asks for something the model has no use for; `param` names the field.",
    401: "No API key, or one that is not known.",
    403: "The service has no keys and so answers clients of this machine only, and no page of another site.",
    404: "No such model, or no such page.",
    405: "The page exists, but not for this method.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body is not application/json.",
    429: "The key's rate limit is reached, or the queue is full; `Retry-After` says when to try again.",
    500: "A defect of the service; its log has the request id.",
    503: "Not ready: models are loading, or the service is going down.",
    504: "The images were not ready within the deadline.",
}
"""Status of an error -> its meaning, for the OpenAPI document."""


class ApiError(Exception):
    """An answer that is no success. code: a word for programs; param: the field that is wrong; headers: beside the body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        assert status in ERRORS, f"status {status} is not documented"
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """Make the HTTP response."""
        return error_response(self.status, self.message, self.code, self.param, self.headers)


def queue_full() -> ApiError:
    """Make the answer of a service that takes no more requests now."""
    message = "The service is busy and its queue is full; try again in a second."
    return ApiError(429, message, "queue_full", headers={"Retry-After": "1"})


def not_ready() -> ApiError:
    """Make the answer of a service without a replica."""
    message = "No replica is ready to draw; try again in a few seconds."
    return ApiError(503, message, "not_ready", headers={"Retry-After": "5"})


def deadline_exceeded(timeout_s: float) -> ApiError:
    """Make the answer to a request whose images were not ready in time."""
    return ApiError(504, f"The images were not ready within {timeout_s:g} s.", "deadline_exceeded")


def error_type(status: int) -> str:
    """Return OpenAI's word for a status."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return LIMITED
    return FAILED if status >= HTTPStatus.INTERNAL_SERVER_ERROR else INVALID


def error_response(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Make an HTTP response in OpenAI's shape."""
    body: dict[str, Any] = {"message": message, "type": error_type(status), "param": param, "code": code}
    return Response(json.dumps({"error": body}), status, dict(headers or {}), "application/json")
