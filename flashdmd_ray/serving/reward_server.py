"""A reward model behind HTTP, which jobs elsewhere use as `kind: remote`, in both encodings of docs/rewards.md. Imports no Ray."""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import io
import json
import os
import threading

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from flashdmd_ray.batch import from_uint8
from flashdmd_ray.config import RewardConfig, validated
from flashdmd_ray.models.rewards import PixelReward, reward_model
from flashdmd_ray.run.http_server import Bounds, listen_on, running_server
from flashdmd_ray.run.messages import one_line
from flashdmd_ray.serving.api_keys import is_loopback
from flashdmd_ray.serving.command import until_stopped

LARGEST_BODY = 128 * 2**20
CONNECTIONS = 16
"""Open ones: each may hold a body in memory."""
MOST_PIXELS = 2**27
"""Pixels of all images of a request: a small PNG file can be a large image."""
DRAIN_S = 30.0
PICTURES = f"images must be PNG files in base64, all of one size, of at most {MOST_PIXELS} pixels together"


def serve_reward(options: argparse.Namespace) -> int:
    """Answer until a signal comes; returns the exit code. Raises ValueError for options and models that are wrong."""
    token = os.environ.get(options.token_env, "") if options.token_env else None
    if token == "":
        raise ValueError(f"--token-env: {options.token_env} is not set in this process")
    if token is None and not is_loopback(options.host):
        raise ValueError(f"--host {options.host}: others could use it; give --token-env NAME")
    entry = {"kind": options.kind, "path": options.path, "dtype": options.dtype, "batch": options.batch}
    settings = validated(RewardConfig, entry)
    if not settings.reads_images or settings.remote is not None:
        raise ValueError(f"KIND: '{options.kind}' is no model of images that can be served here")
    listener = listen_on(options.host, options.port)
    print(f"loading {settings.label} from {settings.path}", flush=True)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = reward_model(settings)
    assert isinstance(model, PixelReward), "it reads images"
    app, stop = build_app(model.to(device), device, token), until_stopped()
    with running_server(app, listener, stop, DRAIN_S, Bounds(CONNECTIONS, CONNECTIONS)):
        host, port = listener.getsockname()[:2]
        print(f"{settings.label} on {device} answers at http://{host}:{port}/score", flush=True)
        stop.wait()
    return 0


def build_app(model: PixelReward, device: torch.device, token: str | None = None) -> Starlette:
    """The application that answers POST /score. Requests wait for one another: the model takes one batch at a time.

    Every refusal is {"error": one line}: 400 a body that is not of the protocol, 401 without the token, 411 or 413 a body of no stated
    length or too long, 500 an error of the model or a score that is not finite.
    """
    one_at_a_time = threading.Lock()

    def answer(kind: str, body: bytes) -> Response:
        try:
            pixels, texts = decoded(kind, body)
        except ValueError as error:
            return _refused(400, str(error))
        try:
            with one_at_a_time, torch.no_grad():
                scores = model.score(from_uint8(pixels).to(device), texts).float().cpu()
        except Exception as error:  # the model may be anybody's
            return _refused(500, f"{type(error).__name__}: {error}")
        if not scores.isfinite().all():
            return _refused(500, "the model gave a score that is not finite")
        return JSONResponse({"scores": scores.tolist()})

    async def score(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return _refused(401, "a bearer token is needed")
        length = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return _refused(411, "the body must have a stated length")
        if int(length) > LARGEST_BODY:
            return _refused(413, f"the body is limited to {LARGEST_BODY} bytes")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        return await run_in_threadpool(answer, kind, await request.body())

    return Starlette(routes=[Route("/score", score, methods=["POST"])])


def decoded(kind: str, body: bytes) -> tuple[Tensor, list[str]]:
    """Pixels uint8 (B, 3, H, W) and prompts of a request. Raises ValueError, one line, for one that is not of the protocol."""
    try:
        if kind == "application/octet-stream":
            texts, pixels = json.loads(_metadata(body)["prompts"]), load(body)["images"]
        elif kind == "application/json":
            tree = json.loads(body)
            texts, images = tree["prompts"], tree["images"]
            pixels = torch.stack([_pixels(image, len(images)) for image in images]) if images else torch.empty(0)
        else:
            raise ValueError("the content type must be application/json or application/octet-stream")
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"not a request of the protocol: {one_line(error)}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("prompts must be a list of texts")
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(PICTURES)
    if len(texts) != len(pixels):
        raise ValueError(f"{len(texts)} prompts for {len(pixels)} images")
    return pixels, texts


def _metadata(body: bytes) -> dict[str, str]:
    """The `__metadata__` of safetensors bytes."""
    size = int.from_bytes(body[:8], "little")
    if size > len(body):
        raise ValueError("the file is cut short")
    metadata: dict[str, str] = json.loads(body[8 : 8 + size])["__metadata__"]
    return metadata


def _pixels(text: str, count: int) -> Tensor:
    """Pixels uint8 (3, H, W) of one of `count` images."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if count * image.width * image.height > MOST_PIXELS:
                raise ValueError(PICTURES)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (binascii.Error, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(PICTURES) from None


def _refused(status: int, text: str) -> Response:
    return JSONResponse({"error": one_line(text)}, status)
