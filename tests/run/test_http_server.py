"""HTTP in the command's own process: its address, its start and its end."""

import asyncio
import socket
import threading
import time

import pytest
import requests
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flashdmd_ray.run.http_server import listen_on, running_server
from flashdmd_ray.serving.command import serve_command


def application(seconds: float = 0.0) -> tuple[Starlette, threading.Event]:
    """Answers after so long; the event is set when a request has come."""
    inside = threading.Event()

    async def answer(request):
        inside.set()
        await asyncio.sleep(seconds)
        return PlainTextResponse("drawn")

    return Starlette(routes=[Route("/", answer)]), inside


def address_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_a_client_that_came_too_early_waits():
    with listen_on("127.0.0.1", 0) as listener:
        answers = []
        url = address_of(listener)
        early = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=30).text))
        early.start()
        time.sleep(0.2)
        app, _ = application()
        with running_server(app, listener, threading.Event(), drain_s=5):
            early.join(30)
    assert answers == ["drawn"]


def test_at_the_end_who_is_inside_is_answered_and_nobody_else():
    app, inside = application(seconds=1.0)
    stop = threading.Event()
    answers = []
    with listen_on("127.0.0.1", 0) as listener:
        url = address_of(listener)
        asking = threading.Thread(target=lambda: answers.append(requests.get(url, timeout=30).text))
        with running_server(app, listener, stop, drain_s=10):
            asking.start()
            assert inside.wait(30)
        asking.join(30)
        assert answers == ["drawn"]
        assert stop.is_set()
        with pytest.raises(requests.ConnectionError):
            requests.get(url, timeout=5)


def test_the_end_does_not_wait_longer_than_it_may():
    app, inside = application(seconds=60.0)
    with listen_on("127.0.0.1", 0) as listener:
        url = address_of(listener)
        asking = threading.Thread(target=lambda: requests.get(url, timeout=30))
        began = time.monotonic()
        with running_server(app, listener, threading.Event(), drain_s=1):
            asking.start()
            assert inside.wait(30)
        asking.join(30)
        assert time.monotonic() - began < 20


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_does_not_start_is_no_silence():
    app, _ = application()
    listener = listen_on("127.0.0.1", 0)
    listener.close()
    with (
        pytest.raises(RuntimeError, match="did not start"),
        running_server(app, listener, threading.Event(), drain_s=1),
    ):
        pass


def test_a_taken_port_is_said_before_anything_is_loaded(tmp_path, capsys):
    export = tmp_path / "demo"
    export.mkdir()
    (export / "flashdmd.json").write_text("{}")
    with listen_on("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        assert serve_command([str(export), "--port", port]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --host 127.0.0.1 --port {port}: Address already in use; choose another address\n"
    )


def test_ingress_replicas_are_refused(capsys):
    assert serve_command(["runs/absent", "--set", "ingress=2"]) == 2
    assert "ingress: flashdmd serve answers HTTP itself" in capsys.readouterr().err
