"""A reward behind HTTP: a model that needs other packages, another machine or another owner. docs/rewards.md has the protocol.

Never pickle, in neither direction: JSON with base64 PNG, or safetensors bytes out; JSON of a bounded size back.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, Self

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from flashdmd_ray.batch import to_uint8
from flashdmd_ray.config import RemoteConfig, RewardConfig
from flashdmd_ray.models.rewards.base import BatchedReward

log = logging.getLogger(__name__)
BACKOFF_S = 0.5
"""Before the second attempt; doubled each time."""
LONGEST_BACKOFF_S = 30.0
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_BYTES_PER_SCORE, _BYTES_BESIDE = 64, 64 * 2**10
_CHUNK = 64 * 2**10


class RemoteError(RuntimeError):
    """No usable answer; the message names the server and the reason."""


class Remote(BatchedReward):
    """reward = what the server answers. Images are sent as bytes: no gradient comes back."""

    name = "remote"

    def __init__(self, url: str, settings: RemoteConfig) -> None:
        super().__init__()
        if settings.token_env is not None and not os.environ.get(settings.token_env):
            raise ValueError(
                f"remote.token_env: {settings.token_env} is not set in this process; export it where rewards run"
            )
        self.url = url
        self.settings = settings

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """The server at `settings.path`. Raises ValueError when the variable of its token is not set."""
        assert settings.remote is not None, "filled in by the configuration"
        return cls(settings.path, settings.remote)

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Rewards float32 (B,) on the server's scale. Raises RemoteError when no attempt brings a usable answer."""
        pixels = to_uint8(images).cpu()
        encode = _as_json if self.settings.encoding == "json" else _as_safetensors
        kind, body = encode(pixels, texts)
        return _scores(self._ask(kind, body, len(texts)), len(texts), self.url).to(images.device)

    def _ask(self, kind: str, body: bytes, count: int) -> bytes:
        """The answer's bytes, after as many attempts as it takes and no more than are allowed."""
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return self._post(kind, body, count)
            except urllib.error.HTTPError as error:
                reason, wait = f"status {error.code}", _retry_after(error)
                error.close()
                if error.code not in _TRY_AGAIN:
                    raise RemoteError(f"the reward server {self.url} refused: {reason}") from None
            except (OSError, HTTPException) as error:  # no connection, a broken one, too slow
                reason, wait = str(error) or type(error).__name__, 0.0
            if attempt < self.settings.attempts:
                wait = min(LONGEST_BACKOFF_S, max(wait, BACKOFF_S * 2 ** (attempt - 1)))
                log.warning("reward server %s: %s; attempt %d in %.1f s", self.url, reason, attempt + 1, wait)
                time.sleep(wait)
        raise RemoteError(f"the reward server {self.url} gave no answer in {self.settings.attempts} attempts: {reason}")

    def _post(self, kind: str, body: bytes, count: int) -> bytes:
        """One attempt. The time limit holds for the whole of it, however slowly bytes arrive."""
        ends = time.monotonic() + self.settings.timeout_s
        headers = {"Content-Type": kind, "Accept": "application/json", **self._credentials()}
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        limit = _BYTES_BESIDE + _BYTES_PER_SCORE * count
        received = bytearray()
        with _opener().open(request, timeout=self.settings.timeout_s) as response:
            while chunk := response.read1(_CHUNK):
                received += chunk
                if len(received) > limit:
                    raise RemoteError(f"the reward server {self.url} answers more than {limit} bytes to {count} images")
                if time.monotonic() > ends:
                    raise TimeoutError(f"no complete answer within {self.settings.timeout_s:g} s")
        return bytes(received)

    def _credentials(self) -> dict[str, str]:
        name = self.settings.token_env
        return {} if name is None else {"Authorization": f"Bearer {os.environ[name]}"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Prompts, images and the token go to the configured address or nowhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_NoRedirects)


def _as_json(pixels: Tensor, texts: Sequence[str]) -> tuple[str, bytes]:
    images = [base64.b64encode(_png(image)).decode("ascii") for image in pixels]
    return "application/json", json.dumps({"prompts": list(texts), "images": images}).encode()


def _png(image: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG")
    return file.getvalue()


def _as_safetensors(pixels: Tensor, texts: Sequence[str]) -> tuple[str, bytes]:
    metadata = {"prompts": json.dumps(list(texts))}
    return "application/octet-stream", save({"images": pixels.contiguous()}, metadata=metadata)


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks to wait; 0 when it says nothing usable."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "0")))
    except ValueError:  # a date
        return 0.0


def _scores(answer: bytes, count: int, url: str) -> Tensor:
    """Raises RemoteError unless the answer is one finite number for each image."""
    try:
        scores = json.loads(answer)["scores"]
        values = [float(score) for score in scores if not isinstance(score, bool)]
    except (ValueError, TypeError, KeyError) as error:
        raise RemoteError(f'the reward server {url} does not answer {{"scores": [...]}}: {error!r}') from None
    if len(values) != count:
        raise RemoteError(f"the reward server {url} answers {len(values)} scores for {count} images")
    if not all(map(math.isfinite, values)):
        raise RemoteError(f"the reward server {url} answers a score that is not finite")
    return torch.tensor(values, dtype=torch.float32)
