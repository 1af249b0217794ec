"""A reward behind HTTP: a model that needs other packages, another machine or another owner. docs/rewards.md has the protocol.

Never pickle, in neither direction: JSON with base64 PNG, or safetensors bytes out; JSON of a bounded size back.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import time
import urllib.parse
import urllib.request
from collections.abc import Coroutine, Sequence
from typing import Any, Self

import aiohttp
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from flashdmd_ray.batch import to_uint8
from flashdmd_ray.config import RemoteConfig, RewardConfig
from flashdmd_ray.models.reward_files import check_token
from flashdmd_ray.models.rewards.base import BatchedReward
from flashdmd_ray.run.messages import one_line

log = logging.getLogger(__name__)
BACKOFF_S = 0.5
"""Before the second attempt; doubled each time."""
LONGEST_BACKOFF_S = 30.0
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_BYTES_PER_SCORE, _BYTES_BESIDE = 64, 64 * 2**10


class RemoteError(RuntimeError):
    """No usable answer; the message names the server and the reason."""


class _Refused(Exception):
    """The server answered with another status than success."""

    def __init__(self, status: int, retry_after: str) -> None:
        super().__init__(status)
        self.status, self.retry_after = status, retry_after


class Remote(BatchedReward):
    """reward = what the server answers. Images are sent as bytes: no gradient comes back."""

    name = "remote"

    def __init__(self, url: str, settings: RemoteConfig) -> None:
        super().__init__()
        check_token("", settings.token_env)
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
        """Return the answer's bytes, after as many attempts as it takes and no more than are allowed."""
        for attempt in range(1, self.settings.attempts + 1):
            wait = 0.0
            try:
                return _in_loop(self._post(kind, body, count))
            except _Refused as refusal:
                reason, wait = f"status {refusal.status}", _seconds(refusal.retry_after)
                if refusal.status not in _TRY_AGAIN:
                    raise RemoteError(f"the reward server {self.url} refused: {reason}") from None
            except TimeoutError:
                reason = f"no complete answer within {self.settings.timeout_s:g} s"
            except (OSError, aiohttp.ClientError) as error:  # no connection, or a broken one
                reason = one_line(error)
            if attempt < self.settings.attempts:
                wait = min(LONGEST_BACKOFF_S, max(wait, BACKOFF_S * 2 ** (attempt - 1)))
                log.warning("reward server %s: %s; attempt %d in %.1f s", self.url, reason, attempt + 1, wait)
                time.sleep(wait)
        raise RemoteError(f"the reward server {self.url} gave no answer in {self.settings.attempts} attempts: {reason}")

    async def _post(self, kind: str, body: bytes, count: int) -> bytes:
        """Make one attempt. The time limit holds for the whole of it, however slowly the server connects, answers or sends.

        Prompts, images and the token go to the configured address: not to where it redirects, and to a proxy only if asked.
        """
        limit = _BYTES_BESIDE + _BYTES_PER_SCORE * count
        headers = {
            "Content-Type": kind,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            **self._credentials(),
        }
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self.settings.timeout_s), auto_decompress=False
            ) as session,
            session.post(
                self.url, data=io.BytesIO(body), headers=headers, allow_redirects=False, proxy=self._proxy()
            ) as response,
        ):
            if response.status >= 300:
                raise _Refused(response.status, response.headers.get("Retry-After", "0"))
            received = bytearray()
            async for piece in response.content.iter_any():
                received += piece
                if len(received) > limit:
                    raise RemoteError(f"the reward server {self.url} answers more than {limit} bytes to {count} images")
            return bytes(received)

    def _credentials(self) -> dict[str, str]:
        name = self.settings.token_env
        return {} if name is None else {"Authorization": f"Bearer {os.environ[name]}"}

    def _proxy(self) -> str | None:
        """The environment's proxy for the server, if `use_proxy` asks for one and `no_proxy` does not name the server."""
        url, proxies = urllib.parse.urlsplit(self.url), urllib.request.getproxies()
        proxy = proxies.get(url.scheme) or proxies.get("all")
        if not self.settings.use_proxy or not proxy or urllib.request.proxy_bypass(url.hostname or ""):
            return None
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if not proxy.lower().startswith(("http://", "https://")):
            raise RemoteError(
                f"remote.use_proxy: proxies by HTTP only, not {proxy.partition('://')[0]}; set http_proxy to one"
            )
        return proxy


def _in_loop(work: Coroutine[Any, Any, bytes]) -> bytes:
    """Run `work`. Unlike `asyncio.run` this does not wait at the end for a look-up of a name that hangs."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


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


def _seconds(retry_after: str) -> float:
    """Seconds that the server asks to wait; 0 when it says nothing usable."""
    try:
        seconds = float(retry_after)
    except ValueError:  # a date
        return 0.0
    return seconds if seconds > 0 else 0.0


def _scores(answer: bytes, count: int, url: str) -> Tensor:
    """Rewards float32 (count,) of an answer. Raises RemoteError unless it is one finite number for each image."""
    try:
        scores = json.loads(answer)["scores"]
        if not isinstance(scores, list) or any(isinstance(score, bool) for score in scores):
            raise TypeError
        values = torch.tensor([1.0 * score for score in scores], dtype=torch.float32)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        said = one_line(answer[:100].decode(errors="replace"))
        raise RemoteError(
            f'the reward server {url} does not answer {{"scores": [one number for each image]}} but {said}'
        ) from None
    if len(values) != count:
        raise RemoteError(f"the reward server {url} answers {len(values)} scores for {count} images")
    if not values.isfinite().all():
        raise RemoteError(f"the reward server {url} answers a score that is not finite")
    return values
