"""`flashdmd reward serve`: the scores of the model in the job, refusals of what is not of the protocol."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import requests
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flashdmd_ray.__main__ import main
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.rewards.remote import RemoteError
from flashdmd_ray.run.http_server import listen_on, running_server
from flashdmd_ray.serving.reward_server import build_app, decoded
from tests.models.rewards.small_rewards import bytes_as_images, noise_bytes

TEXTS = ["a red 4", "", "two blue sevens"]
IMAGES = bytes_as_images(noise_bytes(3, 24, 24))


@contextmanager
def served(model, token=None):
    listener = listen_on("127.0.0.1", 0)
    with running_server(build_app(model, torch.device("cpu"), token), listener, threading.Event(), 5.0):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/score"


def test_a_served_reward_gives_the_scores_of_the_model_itself_in_both_encodings():
    command = [sys.executable, "-m", "flashdmd_ray", "reward", "serve", "pickscore", "demo", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"T": ""}) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "answers at" in line)
        try:
            for encoding in ("json", "safetensors"):
                remote = build_reward("remote", line.split()[-1], batch=2, remote={"encoding": encoding})
                expected = build_reward("pickscore", "demo", batch=2).score(IMAGES, TEXTS)
                assert torch.allclose(remote.score(IMAGES, TEXTS), expected, rtol=1e-6)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


class Odd:
    name = "odd"

    def score(self, images, texts):
        if texts[0] == "raise":
            raise RuntimeError("out of order")
        return torch.full((len(texts),), float("nan"))


def test_what_is_not_of_the_protocol_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    settings = {"token_env": "TOKEN", "attempts": 1}
    file = io.BytesIO()
    Image.new("1", (16_384, 8_193)).save(file, format="PNG")
    bomb = base64.b64encode(file.getvalue()).decode()
    with served(Odd(), "secret") as url:
        for text, reason in (("raise", "500"), ("nan", "500")):
            with pytest.raises(RemoteError, match=reason):
                build_reward("remote", url, remote=settings).score(IMAGES[:1], [text])
        owner = {"Authorization": "Bearer secret"}
        answers = [
            requests.post(url, data=b"{}", timeout=10),
            requests.post(url, data=b"{}", headers=owner, timeout=10),
            requests.post(url, data=iter([b"{}"]), headers=owner, timeout=10),
            requests.post(url, json={"prompts": ["a"], "images": ["bm8="]}, headers=owner, timeout=10),
            requests.post(url, json={"prompts": ["a"], "images": []}, headers=owner, timeout=10),
            requests.post(url, json={"prompts": ["a"], "images": [bomb]}, headers=owner, timeout=10),
            requests.get(url, timeout=10),
        ]
    assert [answer.status_code for answer in answers] == [401, 400, 411, 400, 400, 400, 405]
    assert all("\n" not in answer.json()["error"] for answer in answers[:-1])


@given(
    st.sampled_from(["application/json", "application/octet-stream"]),
    st.binary(max_size=200) | st.text().map(str.encode),
)
def test_any_bytes_are_read_or_refused_with_a_valueerror(kind, body):
    with pytest.raises(ValueError, match=r"^\S"):
        decoded(kind, body)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_any_json_is_read_or_refused_with_a_valueerror(images):
    with pytest.raises(ValueError, match=r"^\S"):
        decoded("application/json", json.dumps({"prompts": ["a"], "images": images}).encode())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["pickscore", "demo", "--host", "0.0.0.0"], "--token-env"),
        (["pickscore", "demo", "--token-env", "NOT_SET"], "NOT_SET is not set"),
        (["latent", "demo"], "no model of images"),
        (["nonsense", "demo"], "kind"),
    ],
)
def test_a_wrong_option_ends_before_anything_is_loaded(words, reason, capsys):
    assert main(["reward", "serve", *words]) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert "loading" not in said.out
