"""Looking at a job's pools and resizing them while it runs: a small HTTP server beside the driver, for the owner of the run folder.

GET /pools; PUT /pools with {"pool": workers, ...}. Both need the bearer token that lies, with the address, in a file of the
run folder which its owner alone can read. No Ray here.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashdmd_ray.config import ControlConfig
from flashdmd_ray.run.sockets import listen
from flashdmd_ray.runtime.protocol import ScalablePool

END_S = 5.0
"""Seconds for the server to end."""
CONNECTIONS = 16
HEAD_BYTES = 16_384


@contextmanager
def open_control(config: ControlConfig, pools: Mapping[str, ScalablePool], path: Path) -> Iterator[None]:
    """Serve `pools` as long as the context lasts; address and token are in `path`. Nothing is served without pools.

    Raises ValueError when the configured address cannot be had.
    """
    if not pools or not config.enabled:
        yield
        return
    listener = listen(config)
    token = secrets.token_urlsafe(32)
    host, port = listener.getsockname()[:2]
    _write_private(path, {"url": f"http://{host}:{port}", "token": token})
    server = _Server(pools, token, listener)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        server.close()


def _write_private(path: Path, facts: Mapping[str, str]) -> None:
    path.unlink(missing_ok=True)  # of a job that was killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(facts, file)


class _Server:
    """FastAPI in a thread, which also imports it: a job need not wait for that. Callers wait in the listener's queue meanwhile."""

    def __init__(self, pools: Mapping[str, ScalablePool], token: str, listener: socket.socket) -> None:
        self._pools = pools
        self._token = token
        self._listener = listener
        self._ended = False
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="flashdmd-control")
        self._thread.start()

    def _run(self) -> None:
        from flashdmd_ray.run.http_server import Bounds, make_server
        from flashdmd_ray.runtime.control_app import build_app

        # The driver's descriptors and memory are for the training: a handful of connections is plenty.
        bounds = Bounds(CONNECTIONS, CONNECTIONS, head_bytes=HEAD_BYTES, keep_alive_s=5)
        self._server = make_server(build_app(self._pools, self._token), bounds, drain_s=END_S)
        self._server.should_exit = self._ended
        self._server.run(sockets=[self._listener])

    def close(self) -> None:
        self._ended = True
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(END_S)
        self._listener.close()
