"""Pools looked at and resized from outside, over HTTP and by the command."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flashdmd_ray.commands.scale import scale_command
from flashdmd_ray.config import ControlConfig
from flashdmd_ray.run.folder import CONTROL
from flashdmd_ray.runtime.control import CONNECTIONS, open_control
from flashdmd_ray.runtime.usage import PoolState


class Sized:
    """A pool of nothing but a size."""

    def __init__(self) -> None:
        self.size = 1

    def state(self) -> PoolState:
        return PoolState(self.size, self.size, 0, 2, 1, 4, 0.456)

    def resize(self, workers: int) -> None:
        if workers > 4:
            raise ValueError("placement.reward: a worker finds\nno room")
        self.size = workers


@pytest.fixture
def pools() -> dict[str, Sized]:
    return {"rollout": Sized(), "my reward": Sized()}


@pytest.fixture
def run(pools: dict[str, Sized], tmp_path: Path) -> Iterator[Path]:
    with open_control(ControlConfig(), pools, tmp_path / CONTROL):
        yield tmp_path


def call(run: Path, method: str, path: str, body: bytes | None = None, token: str | None = None) -> tuple[int, Any]:
    facts = json.loads((run / CONTROL).read_text())
    headers = {
        "Authorization": f"Bearer {facts['token'] if token is None else token}",
        "Content-Type": "application/json",
    }
    request = urllib.request.Request(f"{facts['url']}{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_pools_are_shown_and_resized(run: Path, pools: dict[str, Sized], capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = call(run, "GET", "/pools")
    assert status == 200
    assert shown["rollout"] == {
        "size": 1, "ready": 1, "busy": 0, "waiting": 2, "low": 1, "high": 4, "busy_share": 0.456,
    }  # fmt: skip
    status, shown = call(run, "PUT", "/pools", b'{"rollout": 2, "my reward": 3}')
    assert (status, shown["rollout"]["size"], pools["my reward"].size) == (200, 2, 3)

    assert scale_command([str(run), "my reward=4"]) == 0
    assert pools["my reward"].size == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "pool"
    assert lines[2].split() == ["my", "reward", "4", "4", "0", "2", "46", "%", "1", "to", "4"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"rollout": 5}', 409, "placement.reward: a worker finds no room"),
        (
            b'{"my reward": 2, "rolout": 1}',
            404,
            "no pool 'rolout', did you mean 'rollout'?; there are rollout, my reward",
        ),
        (b'{"rollout": 1.5}', 422, "whole numbers of workers"),
        (b'{"rollout": "2"}', 422, "whole numbers of workers"),
        (b'{"rollout": 99999999999}', 422, "whole numbers of workers"),
        (b"[1]", 422, "whole numbers of workers"),
        (b"{", 422, "whole numbers of workers"),
        (b'{"rollout": ' + b"[" * 15_000, 400, "the body is not valid JSON"),
        (b"{" + b" " * 20_000, 413, "at most 16384 bytes"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(
    run: Path, pools: dict[str, Sized], body: bytes, status: int, reason: str
) -> None:
    found, answer = call(run, "PUT", "/pools", body)
    assert found == status
    assert set(answer) == {"error"}
    assert reason in answer["error"]
    assert "\n" not in answer["error"]
    assert [pool.size for pool in pools.values()] == [1, 1]


@pytest.mark.parametrize("token", ["", "wrong", "ü"])
def test_nobody_gets_in_without_the_token(run: Path, pools: dict[str, Sized], token: str) -> None:
    for method, body in (("GET", None), ("PUT", b'{"rollout": 2}')):
        assert call(run, method, "/pools", body, token.encode().decode("latin-1"))[0] == 401
    assert pools["rollout"].size == 1
    assert call(run, "GET", "/openapi.json")[0] == 404
    assert call(run, "DELETE", "/pools")[0] == 405


def test_a_stranger_takes_neither_connections_nor_memory_of_the_job(run: Path) -> None:
    address = ("127.0.0.1", int(json.loads((run / CONTROL).read_text())["url"].rpartition(":")[2]))
    call(run, "GET", "/pools")  # it is up
    with contextlib.ExitStack() as ends:
        strangers = [ends.enter_context(socket.create_connection(address, timeout=60)) for _ in range(40)]
        answers: list[bytes] = []
        while answers.count(b"HTTP/1.1 503 ") < len(strangers) - CONNECTIONS:
            readable = select.select(strangers, [], [], 60)[0]
            assert readable, "further connections are kept"
            answers += [stranger.recv(13) for stranger in readable]
    with socket.create_connection(address, timeout=60) as stranger:
        with contextlib.suppress(ConnectionError):
            stranger.sendall(b"GET /pools HTTP/1.1\r\nX: " + b"y" * 2**20)
        assert stranger.recv(100).startswith(b"HTTP/1.1 431 ")
    assert call(run, "GET", "/pools")[0] == 200


def test_only_the_owner_can_read_the_token_and_it_is_gone_afterwards(pools: dict[str, Sized], tmp_path: Path) -> None:
    path = tmp_path / CONTROL
    path.write_text("of a job that was killed")
    with open_control(ControlConfig(), pools, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["url"].startswith("http://127.0.0.1:")
        assert call(tmp_path, "GET", "/pools")[0] == 200
    assert not path.exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "flashdmd-control"]
    with open_control(ControlConfig(enabled=False), pools, path):
        assert not path.exists()
    with open_control(ControlConfig(), {}, path):
        assert not path.exists(), "one process has no pools to serve"


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["rollout=5"], 2, "no room"),
        (["rolout=2"], 2, "did you mean 'rollout'"),
        (["rollout"], 2, "expected pool=workers"),
        (["rollout=-1"], 2, "expected pool=workers"),
    ],
)
def test_the_command_says_in_one_line_what_was_refused(
    run: Path, arguments: list[str], code: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scale_command([str(run), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_without_a_job_it_says_so(pools: dict[str, Sized], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale_command([str(tmp_path)]) == 2
    assert "no job with pools runs there" in capsys.readouterr().err
    with open_control(ControlConfig(), pools, tmp_path / CONTROL):
        left_over = (tmp_path / CONTROL).read_text()
    (tmp_path / CONTROL).write_text(left_over)
    assert scale_command([str(tmp_path)]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_an_address_in_use_is_refused(run: Path, pools: dict[str, Sized], tmp_path: Path) -> None:
    port = int(json.loads((run / CONTROL).read_text())["url"].rpartition(":")[2])
    with (
        pytest.raises(ValueError, match=rf"control: cannot listen on 127.0.0.1:{port} .* set control.port to 0"),
        open_control(ControlConfig(port=port), pools, tmp_path / "other.json"),
    ):
        pass
