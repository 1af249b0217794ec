"""HTTP server in a thread of this process, with bounds that keep strangers from taking it down. The image API and a job's pools use it.

It is uvicorn on h11, which bounds the size of headers. `BoundedProtocol` adds what uvicorn lacks: time limits for a client that sends
or reads too slowly, and limits on open connections.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

START_S = 30.0
"""Seconds for the server to start."""
END_S = 10.0
"""Seconds for the thread to end, beyond those that requests have to be finished."""
LINGER_S = 1.0
"""Seconds that are left to a client to read why its headers were refused, while it may still be sending them."""
MIN_SENT = 16_384
"""Bytes of an answer that a client must take in `stall_s` seconds, or all that is left of it."""
MAX_CONNECTIONS = 4096


@dataclass
class Bounds:
    """Limits of one server, and how many connections it has now."""

    connections: int
    """Open connections in all; further ones are answered with 503."""
    per_address: int
    """Open connections of one client address; further ones are answered with 503."""
    head_bytes: int = 65_536
    """Bytes of a request line with its headers; more is answered with 431."""
    head_s: float = 10.0
    """Seconds for a request line with its headers to arrive, and for the rest of a body whose answer was sent."""
    stall_s: float = 15.0
    """Seconds in which a client must take MIN_SENT bytes of an answer."""
    keep_alive_s: int = 90
    """Seconds that an idle connection stays open."""
    open: Counter[str] = field(default_factory=Counter)
    """Address -> open connections."""


def default_bounds(connections: int | None = None, per_address: int | None = None) -> Bounds:
    """Make bounds that leave most file descriptors of this process to its other work; one address gets half of the connections."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if connections is None:
        connections = MAX_CONNECTIONS if limit == resource.RLIM_INFINITY else max(8, min(MAX_CONNECTIONS, limit // 3))
    return Bounds(connections, min(per_address or max(1, connections // 2), connections))


class BoundedProtocol(H11Protocol):
    """One connection. Every state in which it waits for its client ends after some time."""

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._address: str | None = None
        self._late: asyncio.TimerHandle | None = None
        self._progress: asyncio.TimerHandle | None = None
        self._unsent: tuple[Any, int] = (None, 0)
        self._refused = False
        self._head_bytes = 0
        """Bytes of the head that is arriving."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        address = self._address = self.client[0] if self.client else ""
        bounds = self._bounds
        bounds.open[address] += 1
        if bounds.open.total() > bounds.connections or bounds.open[address] > bounds.per_address:
            self._refuse("503 Service Unavailable", "Too many connections.", "Retry-After: 1\r\n")
            transport.close()
            return
        self._expect()
        self._progress = self.loop.call_later(bounds.stall_s, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._address is not None:
            self._bounds.open[self._address] -= 1
            self._bounds.open += Counter()  # forgets addresses that have none
            self._address = None
        self._expect_nothing()
        if self._progress is not None:
            self._progress.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self._refused and not self.transport.is_closing():
            size = len(data)
            if self.conn.their_state is h11.IDLE:
                # h11 measures unfinished heads only: it must see one that is too long before its end.
                size = max(1, self._bounds.head_bytes + 1 - self._head_bytes)
                self._head_bytes += len(data[:size])
            piece, data = data[:size], data[size:]
            super().data_received(piece)
            if self.conn.their_state is not h11.IDLE:
                self._head_bytes = 0
        if self.conn.their_state is h11.IDLE or self._owes_body():
            self._expect()
        else:
            self._expect_nothing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        begun_next = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if begun_next or self._owes_body():
            self._expect()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) <= self._bounds.head_bytes:
            super().send_400_response(msg)
            return
        self._refuse("431 Request Header Fields Too Large", f"Headers are limited to {self._bounds.head_bytes} bytes.")
        self.loop.call_later(LINGER_S, self.transport.abort)

    def _refuse(self, status: str, message: str, headers: str = "") -> None:
        """Send an answer outside h11 and read nothing more."""
        self._refused = True
        head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(message)}\r\n"
        self.transport.write(f"{head}{headers}Connection: close\r\n\r\n{message}".encode())

    def _owes_body(self) -> bool:
        """Whether the client is still sending the body of a request that was answered."""
        return self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete

    def _expect(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self._bounds.head_s, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _check_progress(self) -> None:
        """Close the connection of a client that does not read its answer; also one that is closing and waits for that."""
        size = self.transport.get_write_buffer_size()
        cycle, before = self._unsent
        if before and cycle is self.cycle and size > max(0, before - MIN_SENT):
            self.transport.abort()
            return
        self._unsent = (self.cycle, size)
        self._progress = self.loop.call_later(self._bounds.stall_s, self._check_progress)


def make_server(app: ASGIApp, bounds: Bounds, drain_s: float) -> uvicorn.Server:
    """Make a uvicorn server that keeps to `bounds`; at its end requests have `drain_s` seconds to be finished.

    Headers about proxies are not believed: the client of a request is whoever connected.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=functools.partial(BoundedProtocol, bounds=bounds),  # type: ignore[arg-type]
            h11_max_incomplete_event_size=bounds.head_bytes,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            access_log=False,  # every request has a line of the application's own
            log_config=None,
            log_level="error",  # a line for each malformed request would let strangers fill the log
            timeout_keep_alive=bounds.keep_alive_s,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
    )


def listen_on(host: str, port: int) -> socket.socket:
    """Open a socket that listens there; who connects is answered once it is given to `running_server`.

    Raises ValueError when the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ValueError(f"--host {host} --port {port}: {reason}; choose another address") from None


@contextmanager
def running_server(
    app: ASGIApp, listener: socket.socket, stop: threading.Event, drain_s: float, bounds: Bounds | None = None
) -> Iterator[None]:
    """Answer requests at the address of `listener` by a thread of this process.

    At the end it takes no new ones and finishes those that are here, for `drain_s` seconds at most.

    stop: set when the server has ended. Raises RuntimeError when it does not start, or has ended before the caller was done.
    """
    server = make_server(app, bounds or default_bounds(), drain_s)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            stop.set()

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        _wait_for_start(server, thread)
        yield
        if not thread.is_alive():
            raise RuntimeError("the HTTP server ended by itself")
    finally:
        server.should_exit = True
        thread.join(drain_s + END_S)


def _wait_for_start(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the HTTP server did not start")
        time.sleep(0.01)
