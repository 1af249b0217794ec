"""Decoding the images that come next while the last ones are used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from flashdmd_ray.data.pixels import Pixels
from flashdmd_ray.data.sample import Bad

Size = tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """One image, uint8 (H, W, 3). sample: where it is in the index, after skipping the `bad` ones before it."""

    pixels: Pixels
    sample: int
    bad: tuple[Bad, ...] = field(default=())


class Decoder(Protocol):
    """Turns positions in the stream of real images into images."""

    def take(self, positions: Sequence[int], size: Size) -> list[Decoded]:
        """The images at `positions`, cropped and resized to `size` = (H, W). Raises what decoding raises."""


class SampleReader(Protocol):
    """Interface of the real images to a decoder."""

    def numbers(self, positions: Sequence[int]) -> list[int]:
        """The samples at these positions."""

    def find(self, number: int, size: Size) -> Decoded:
        """One sample, decoded."""


class ThreadDecoder:
    """Decodes in threads of this process; Pillow computes without the interpreter's lock.

    Positions come in equal strides (the global batch), so what comes next is known from the last two calls. A wrong
    guess costs a decoding, never another image.
    """

    def __init__(self, images: SampleReader, threads: int, batches: int) -> None:
        """batches: how many of them to be ahead."""
        self._images = images
        self._batches = batches
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._begun: dict[tuple[int, Size], Future[Decoded]] = {}
        self._last: tuple[int, ...] = ()

    def take(self, positions: Sequence[int], size: Size) -> list[Decoded]:
        now = tuple(positions)
        self._begin(now, size)
        futures = [self._begun[p, size] for p in now]
        ahead = following(self._last, now, self._batches)
        kept = {(p, size) for p in (*now, *ahead)}
        for stale in self._begun.keys() - kept:
            self._begun.pop(stale).cancel()
        for used in set(now) - set(ahead):
            del self._begun[used, size]
        self._begin(ahead, size)
        self._last = now
        return [future.result() for future in futures]

    def _begin(self, positions: Sequence[int], size: Size) -> None:
        new = [p for p in dict.fromkeys(positions) if (p, size) not in self._begun]
        for position, number in zip(new, self._images.numbers(new), strict=True):
            self._begun[position, size] = self._pool.submit(self._images.find, number, size)


def stride(last: Sequence[int], now: Sequence[int]) -> int | None:
    """Distance of a batch from the one before; None when it does not follow it."""
    if len(last) != len(now) or not now:
        return None
    steps = {b - a for a, b in zip(last, now, strict=True)}
    step = steps.pop()
    return step if not steps and step > 0 else None


def following(last: Sequence[int], now: Sequence[int], batches: int) -> list[int]:
    """The positions of the next batches; none before two calls have shown the stride."""
    step = stride(last, now)
    return [] if step is None else [p + k * step for k in range(1, batches + 1) for p in now]
