"""HTTP server in the process of the command: one hop less than Serve's proxy and an ingress replica, which a cluster has instead."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE_S = 90
"""Seconds that an idle connection stays open."""
START_S = 30.0
"""Seconds for the server to start."""
END_S = 10.0
"""Seconds for the thread to end, beyond those that requests have to be finished."""


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
def running_server(app: ASGIApp, listener: socket.socket, stop: threading.Event, drain_s: float) -> Iterator[None]:
    """Answer requests at the address of `listener` by a thread of this process.

    At the end it takes no new ones and finishes those that are here, for `drain_s` seconds at most.

    stop: set when the server has ended. Raises RuntimeError when it does not start, or has ended before the caller was done.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            access_log=False,  # every request has a line of the application's own
            log_config=None,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
    )

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
