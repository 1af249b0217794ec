"""Clients that send or read too slowly, too much or from too many connections, by raw sockets; others are answered meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flashdmd_ray.run.http_server import Bounds, default_bounds, listen_on, running_server

LARGE = 32 * 2**20
WAIT_S = 20.0


async def look(request: Request) -> PlainTextResponse:
    return PlainTextResponse("here")


async def large(request: Request) -> PlainTextResponse:
    return PlainTextResponse("x" * LARGE)


@contextlib.contextmanager
def serving(**bounds: Any) -> Iterator[tuple[str, int]]:
    app = Starlette(routes=[Route("/", look, methods=["GET", "POST"]), Route("/large", large)])
    settings = {"connections": 8, "per_address": 8, "head_s": 0.5, "stall_s": 0.5} | bounds
    with (
        listen_on("127.0.0.1", 0) as listener,
        running_server(app, listener, threading.Event(), drain_s=1, bounds=Bounds(**settings)),
    ):
        yield listener.getsockname()[:2]


def connect(address: tuple[str, int], data: bytes = b"") -> socket.socket:
    client = socket.create_connection(address, timeout=WAIT_S)
    client.sendall(data)
    return client


def answer(client: socket.socket) -> bytes:
    """Everything up to the end of the connection, however it ends."""
    received = b""
    with client, contextlib.suppress(ConnectionError):
        while data := client.recv(65_536):
            received += data
    return received


def ask(address: tuple[str, int]) -> bytes:
    return answer(connect(address, b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))


@pytest.mark.parametrize(
    "start", [b"", b"GET", b"POST / HTTP/1.1\r\nX-", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT"]
)
def test_a_head_that_is_never_finished_is_closed(start: bytes) -> None:
    """Also one that goes on byte by byte, and a second one on the same connection."""
    with serving() as address:
        silent, dripping = connect(address, start), connect(address, start)
        end = time.monotonic() + WAIT_S
        with dripping, contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                dripping.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < end
        answer(silent)
        assert b"here" in ask(address)


def test_the_rest_of_a_body_that_nobody_reads_is_not_waited_for() -> None:
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    with serving() as address, connect(address, head) as client, contextlib.suppress(ConnectionError):
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            client.sendall(b"x")
            time.sleep(0.05)
        pytest.fail("still open")


def test_a_client_that_does_not_read_its_answer_is_closed() -> None:
    bounds = Bounds(8, 8, stall_s=0.5)
    with serving(stall_s=0.5) as address:
        client = connect(address, b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(3 * bounds.stall_s)
        assert len(answer(client)) < LARGE
        slow = connect(address, b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = 0
        with slow:
            while data := slow.recv(2**20):
                received += len(data)
                time.sleep(0.02)
        assert received > LARGE, "a slow client is no stalled one"


@pytest.mark.parametrize("size", [65_537, 300_000, 5_000_000])
@pytest.mark.parametrize("line", [b"X: %s", b"X: y\r\n"])
def test_large_headers_are_refused(size: int, line: bytes) -> None:
    """One long header, or many short ones; refused at once, whole or not, and read no further."""
    headers = line % (b"y" * size) if b"%s" in line else line * (size // len(line))
    with serving(head_s=WAIT_S) as address:
        client = connect(address)
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 431 ")
        assert b"here" in ask(address)


def test_headers_below_the_limit_are_read() -> None:
    with serving() as address:
        head = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"y" * 50_000 + b"\r\n\r\n"
        assert b"here" in answer(connect(address, head))


def test_connections_are_bounded_in_all_and_per_address() -> None:
    with serving(connections=3, per_address=2, head_s=WAIT_S) as address, contextlib.ExitStack() as clients:
        for _ in range(2):
            clients.enter_context(connect(address))
        assert ask(address).startswith(b"HTTP/1.1 503 ")
        for number in (2, 3):  # another address has room for one
            client = socket.create_connection(address, timeout=WAIT_S, source_address=(f"127.0.0.{number}", 0))
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            clients.enter_context(client)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 " if number == 2 else b"HTTP/1.1 503 ")
        clients.close()
        end = time.monotonic() + WAIT_S
        while not ask(address).startswith(b"HTTP/1.1 200 "):
            assert time.monotonic() < end, "closed connections still count"
            time.sleep(0.05)


def test_connections_leave_descriptors_to_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((256, (85, 42)), (1_000_000, (4096, 2048))):
        monkeypatch.setattr("resource.getrlimit", lambda _, limit=limit: (limit, limit))
        bounds = default_bounds()
        assert (bounds.connections, bounds.per_address) == expected
    assert default_bounds(10, 50).per_address == 10
