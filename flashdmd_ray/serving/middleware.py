"""Around every request: its id, who it comes from, one line in the log, and an answer in OpenAI's shape whatever happens."""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashdmd_ray.serving import LOGGER
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.keys import Doorkeeper
from flashdmd_ray.serving.metrics import Metrics

log = logging.getLogger(LOGGER)

OPEN_PATHS = {"/", "/healthz", "/openapi.json"}
"""Answered without a key: they tell nothing that is secret, and load balancers and browsers have none."""
OPEN_PREFIX = "/page/"
"""The page's files."""
STATE = "flashdmd_ray"
ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestState:
    """client: who asks, as `Doorkeeper.admit` names it; '' where no key is needed."""

    request_id: str
    client: str = ""


def state_of(request: Request) -> RequestState:
    """What the middleware found out about a request."""
    state: RequestState = request.scope[STATE]
    return state


class RequestScope:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._doorkeeper = doorkeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope[STATE] = RequestState(request_id(headers.get("x-request-id")))
        answer = _Answer(send, state.request_id)
        try:
            if not _is_open(scope["path"]):
                state.client = self._doorkeeper.admit(headers.get("authorization"), (scope.get("client") or (None,))[0])
            await self._app(scope, receive, answer.send)
        except ApiError as error:
            await error.response()(scope, receive, answer.send)
        except Exception:
            log.exception("request %s failed", state.request_id)
            if not answer.started:
                message = f"The service failed; its log tells more about request {state.request_id}."
                await ApiError(500, message, "internal_error").response()(scope, receive, answer.send)
        finally:
            self._metrics.answered(scope["path"], answer.status, answer.seconds)
            _log(scope, state, answer)


class _Answer:
    """The response on its way out."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self._began = time.monotonic()
        self.status = 0

    @property
    def started(self) -> bool:
        return self.status != 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            headers["openai-processing-ms"] = str(round(1000 * self.seconds))
            headers["cache-control"] = headers.get("cache-control", "no-store")
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)


def request_id(given: str | None) -> str:
    """The client's own id where it is a plain word, else a new one."""
    return given if given is not None and ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _log(scope: Scope, state: RequestState, answer: _Answer) -> None:
    """No prompt, no key, no body: what was asked for and how it went."""
    log.info(
        "request %s: %s %s -> %s in %d ms (client %s)",
        state.request_id,
        scope["method"],
        ascii(scope["path"][:200]),  # a path is the client's text: no line breaks of its own
        answer.status or "no answer",
        1000 * answer.seconds,
        state.client or "-",
    )
