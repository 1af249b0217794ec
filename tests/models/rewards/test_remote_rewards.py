"""Rewards behind HTTP: a real server on the loopback address, with every way of failing that a client must survive."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from flashdmd_ray.models.rewards import PixelReward, build_reward
from flashdmd_ray.models.rewards import remote as remote_module
from flashdmd_ray.models.rewards.remote import RemoteError
from flashdmd_ray.run.variables import prepare_environment
from tests.models.rewards.small_rewards import bytes_as_images, noise_bytes

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
Answer = Callable[[BaseHTTPRequestHandler, bytes, int], None]


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


def answering(answer: Answer) -> type[BaseHTTPRequestHandler]:
    """A handler that leaves the answer to `answer(handler, body, number of the request)`."""

    class Handler(BaseHTTPRequestHandler):
        requests = 0

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            type(self).requests += 1
            answer(self, body, type(self).requests)

        def log_message(self, *args: object) -> None: ...

    return Handler


def send(handler: BaseHTTPRequestHandler, content: object, status: int = 200, **headers: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def ask(answer: Answer, count: int = 2, **settings: object) -> torch.Tensor:
    images = bytes_as_images(noise_bytes(count, 6, 9))
    with served(answering(answer)) as url:
        return build_reward("remote", url, remote=settings).score(images, [f"text {i}" for i in range(count)])


def example(title: str) -> str:
    """The Python block below that heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"# {title}\n", 1)[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("encoding", ["json", "safetensors"])
def test_the_reference_server_of_the_page_gets_every_pixel_and_prompt(encoding):
    """It answers the mean brightness and adds the length of the prompt, which is computed here again."""
    names: dict = {"__name__": "reference_server"}
    exec(compile(example("A reference server"), "docs/rewards.md", "exec"), names)
    pixels, texts = noise_bytes(5, 7, 10), ["", "ä", "a red 4", '"quoted"\n', "x" * 300]
    with served(names["Handler"]) as url:
        reward = build_reward("remote", url, batch=2, remote={"encoding": encoding})
        assert isinstance(reward, PixelReward)
        rewards = reward.score(bytes_as_images(pixels), texts)
    expected = pixels.float().mean(dim=(1, 2, 3)) / 255 + torch.tensor([len(text) for text in texts])
    torch.testing.assert_close(rewards, expected, rtol=1e-6, atol=1e-5)


def test_safetensors_bodies_hold_tensors_and_json_alone():
    def answer(handler, body, _):
        images = load(body)["images"]
        assert images.dtype == torch.uint8
        assert images.shape == (2, 3, 6, 9)
        send(handler, {"scores": [0.5, 1]})

    assert ask(answer, encoding="safetensors").tolist() == [0.5, 1.0]


def test_what_may_pass_is_tried_again_and_no_more_than_allowed(monkeypatch):
    monkeypatch.setattr(remote_module, "BACKOFF_S", 0.01)

    def twice(handler, body, number):
        send(handler, {"scores": [1.0, 2.0]}, status=503 if number < 3 else 200, Retry_After="0")

    assert ask(twice, attempts=3).tolist() == [1.0, 2.0]
    with pytest.raises(RemoteError, match="gave no answer in 2 attempts: status 503"):
        ask(twice, attempts=2)


def test_a_broken_connection_is_tried_again(monkeypatch):
    monkeypatch.setattr(remote_module, "BACKOFF_S", 0.01)

    def answer(handler, body, number):
        if number == 1:
            handler.connection.close()
        else:
            send(handler, {"scores": [1.0, 2.0]})

    assert ask(answer).tolist() == [1.0, 2.0]


def test_the_server_decides_how_long_to_wait(monkeypatch):
    monkeypatch.setattr(remote_module, "BACKOFF_S", 0.01)
    times = []

    def answer(handler, body, number):
        times.append(time.monotonic())
        send(handler, {"scores": [1.0, 2.0]}, status=429 if number == 1 else 200, Retry_After="0.4")

    ask(answer)
    assert 0.4 <= times[1] - times[0] < 2


def test_a_refusal_is_not_repeated():
    asked = []

    def answer(handler, body, number):
        asked.append(number)
        send(handler, {}, status=401)

    with pytest.raises(RemoteError, match=r"the reward server http://127\.0\.0\.1:\d+/score refused: status 401"):
        ask(answer)
    assert asked == [1]


def test_a_redirect_is_not_followed():
    with pytest.raises(RemoteError, match="refused: status 307"):
        ask(lambda handler, body, _: send(handler, {}, status=307, Location="http://127.0.0.1:9/elsewhere"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"scores": [1.0]}, "answers 1 scores for 2 images"),
        ({"scores": [1.0, float("nan")]}, "not finite"),
        ({"scores": [1.0, float("inf")]}, "not finite"),
        ({"scores": [1.0, None]}, "does not answer"),
        ({"scores": [1.0, 1e300]}, "not finite"),
        ({"scores": [1.0, True]}, "does not answer"),
        ({"scores": [1.0, "2"]}, "does not answer"),
        ({"scores": "12"}, "does not answer"),
        ({"scores": [1.0, 10**400]}, "does not answer"),
        ([1.0, 2.0], r"does not answer .* but \[1.0, 2.0\]"),
        (b'{"scores":' + b"[" * 50_000, "does not answer"),
        (b"\x80\x04pickled", "does not answer"),
        (b"[" * 200_000, "answers more than"),
    ],
)
def test_an_unusable_answer_is_an_error_and_never_a_reward(content, says):
    with pytest.raises(RemoteError, match=says):
        ask(lambda handler, body, _: send(handler, content))


def test_a_server_that_dribbles_is_given_up(monkeypatch):
    """Each byte comes in time, the answer does not."""

    def answer(handler, body, _):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    with pytest.raises(RemoteError, match=r"no complete answer within 0\.3 s"):
        ask(answer, timeout_s=0.3, attempts=1)


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 100 Continue\r\n\r\n"] * 400,
        [HEAD, *[b"X-A: a\r\n"] * 100],
        [bytes([letter]) for letter in HEAD + b"X-A: a\r\n" * 100],
    ],
)
def test_a_server_that_never_comes_to_its_answer_is_given_up(pieces):
    """Endless interim answers, endless headers, and an answer that comes letter by letter."""

    def answer(handler, body, _):
        for piece in pieces:
            try:
                handler.wfile.write(piece)
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.05)

    with pytest.raises(RemoteError, match=r"gave no answer in 1 attempts: no complete answer within 0\.5 s"):
        ask(answer, timeout_s=0.5, attempts=1)


def test_a_proxy_of_the_environment_sees_nothing_unless_asked(monkeypatch):
    """Behind the proxy is a server whose name nothing resolves, so that the answer can only come through it."""
    at_proxy = []

    def through(handler, body, _):
        at_proxy.append(handler.path)
        send(handler, {"scores": [5.0, 6.0]})

    with served(answering(through)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.delenv("NO_PROXY", raising=False)
        prepare_environment(os.environ)
        for settings in ({}, {"use_proxy": True}):
            assert ask(lambda handler, body, _: send(handler, {"scores": [1.0, 2.0]}), **settings).tolist() == [
                1.0,
                2.0,
            ]
        assert at_proxy == []
        elsewhere = build_reward("remote", "http://rewards.invalid/score", remote={"use_proxy": True})
        assert elsewhere.score(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [5.0, 6.0]
        assert at_proxy == ["http://rewards.invalid/score"]
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("all_proxy", proxy.removeprefix("http://"))  # as curl takes it
        assert elsewhere.score(torch.zeros(2, 3, 4, 4), ["a", "b"]).tolist() == [5.0, 6.0]
        monkeypatch.setenv("all_proxy", "socks5://me:secret@127.0.0.1:1")
        with pytest.raises(RemoteError, match=r"proxies by HTTP only, not socks5; set http_proxy") as refused:
            elsewhere.score(torch.zeros(2, 3, 4, 4), ["a", "b"])
        assert "secret" not in str(refused.value)
        direct = build_reward("remote", "http://rewards.invalid/score", remote={"attempts": 1})
        with pytest.raises(RemoteError, match=r"rewards\.invalid"):
            direct.score(torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_a_server_that_hangs_or_is_not_there(monkeypatch):
    monkeypatch.setattr(remote_module, "BACKOFF_S", 0.01)
    with pytest.raises(RemoteError, match=r"gave no answer in 2 attempts: no complete answer within 0\.2 s"):
        ask(lambda handler, body, _: time.sleep(1), timeout_s=0.2, attempts=2)
    nobody = build_reward("remote", "http://127.0.0.1:9/", remote={"attempts": 1})
    with pytest.raises(RemoteError, match="gave no answer in 1 attempts: Cannot connect"):
        nobody.score(torch.zeros(1, 3, 4, 4), ["x"])


def test_the_token_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    seen = []

    def answer(handler, body, _):
        seen.append(handler.headers["Authorization"])
        send(handler, {"scores": [1.0, 2.0]})

    ask(answer, token_env="REWARD_TOKEN")
    ask(answer)
    assert seen == ["Bearer abc", None]
    with pytest.raises(ValueError, match=r"remote\.token_env: REWARD_TOKEN_2 is not set"):
        ask(answer, token_env="REWARD_TOKEN_2")
