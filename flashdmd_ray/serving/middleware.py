"""Middleware around every request: its id, its client, its line in the log, and an answer in OpenAI's shape whatever happens."""

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
from flashdmd_ray.serving.api_keys import ApiKeys
from flashdmd_ray.serving.errors import ApiError
from flashdmd_ray.serving.metrics import Metrics

log = logging.getLogger(LOGGER)

OPEN_PATHS = {"/", "/healthz", "/openapi.json"}
"""Paths that need no key: they tell nothing that is secret, and load balancers and browsers have none."""
OPEN_PREFIX = "/page/"
"""Folder of the page's files."""
STATE = "flashdmd_ray"
ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class RequestState:
    """Facts about one request. client: who asks, as `ApiKeys.identify` names it; '' where no key is needed."""

    request_id: str
    client: str = ""


def state_of(request: Request) -> RequestState:
    """Return the facts that the middleware attached to a request."""
    state: RequestState = request.scope[STATE]
    return state


class RequestScope:
    """ASGI middleware that attaches a `RequestState` to each request."""

    def __init__(self, app: ASGIApp, api_keys: ApiKeys, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state = scope[STATE] = RequestState(request_id(headers.get("x-request-id")))
        response = _Response(send, state.request_id)
        try:
            if not _is_open(scope["path"]):
                state.client = self._api_keys.identify(headers, (scope.get("client") or (None,))[0])
            await self._app(scope, receive, response.send)
        except ApiError as error:
            await error.response()(scope, receive, response.send)
        except Exception:
            log.exception("request %s failed", state.request_id)
            if not response.started:
                message = f"The service failed; its log tells more about request {state.request_id}."
                await ApiError(500, message, "internal_error").response()(scope, receive, response.send)
        finally:
            self._metrics.record_answer(scope["path"], response.status, response.seconds)
            _log(scope, state, response)


class _Response:
    """The response on its way to the client."""

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
    """Take the client's own id where it is a plain word, else make one."""
    return given if given is not None and ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _log(scope: Scope, state: RequestState, response: _Response) -> None:
    """Log path, status and time of a request: no prompt, no key, no body. A page's files are no news."""
    log.log(
        logging.DEBUG if scope["path"].startswith(OPEN_PREFIX) else logging.INFO,
        "request %s: %s %s -> %s in %d ms (client %s)",
        state.request_id,
        scope["method"],
        ascii(scope["path"][:200]),  # a path is the client's text: no line breaks of its own
        response.status or "no answer",
        1000 * response.seconds,
        state.client or "-",
    )
