"""Prompts and real images from files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flashdmd_ray.batch import from_uint8
from flashdmd_ray.data.image_reader import ImageReader
from flashdmd_ray.data.image_source import RealLatents, Reals
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.order import Order
from flashdmd_ray.data.precomputed import StoredLatents
from flashdmd_ray.data.prefetch import Decoded, Decoder, Size
from flashdmd_ray.data.sample import Bad
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.data.waiting import waiting_for_data

log = logging.getLogger(__name__)

ENOUGH = 100
"""Images decoded before the share of bad ones says anything."""


class FileSource:
    """See `ImageSource`."""

    def __init__(
        self,
        images: ImageReader,
        prompts: Index,
        decoder: Decoder,
        max_bad_fraction: float,
    ) -> None:
        self.images = images
        self.decoder = decoder
        self.stored: StoredLatents | None = None
        """Latents computed before the run, for `latents`."""
        self._prompts = prompts
        self._prompt_order = Order([len(prompts)], images.order.seed)
        self._max_bad_fraction = max_bad_fraction
        self._decoded = 0
        self._damaged = Tally()
        self._reported: set[Bad] = set()
        self._replaced = 0

    def __len__(self) -> int:
        return len(self.images)

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        return self._prompts.captions(self._prompt_order.samples(stream, positions.numpy()).tolist())

    def reals(self, positions: Tensor, size: Size) -> Reals:
        """Raises ValueError, with the report, when more than data.max_bad_fraction of the images decoded so far were bad."""
        with waiting_for_data():
            decoded = self.decoder.take(positions.tolist(), size)
        self._count(decoded)
        pixels = torch.from_numpy(np.stack([d.pixels for d in decoded])).permute(0, 3, 1, 2)
        captions = self.images.index.captions([d.sample for d in decoded])
        return Reals(from_uint8(pixels), captions, sum(bool(d.bad) for d in decoded))

    def latents(self, positions: Tensor, size: Size, encode: Callable[[Tensor], Tensor]) -> RealLatents:
        if self.stored is None:
            reals = self.reals(positions, size)
            return RealLatents(encode(reals.images), reals.captions, reals.replaced)
        wanted = self.images.numbers(positions.tolist())
        with waiting_for_data():
            values, samples = self.stored.rows(wanted)
        replaced = sum(a != b for a, b in zip(samples, wanted, strict=True))
        return RealLatents(values, self.images.index.captions(samples), replaced)

    def report(self) -> Tally:
        return self._damaged

    def _count(self, decoded: Sequence[Decoded]) -> None:
        self._decoded += len(decoded)
        self._replaced += sum(bool(one.bad) for one in decoded)
        for bad in (bad for one in decoded for bad in one.bad if bad not in self._reported):
            self._reported.add(bad)
            self._damaged.add(bad)
            if bad.key in self._damaged.bad[bad.reason].names:
                log.warning("%s: %s; the next image takes its place", bad.key, bad.reason)
        if self._decoded >= ENOUGH and self._replaced > self._max_bad_fraction * self._decoded:
            raise ValueError(
                f"data.source: {self._replaced} of {self._decoded} images could not be decoded "
                f"({self._replaced / self._decoded:.1%}, allowed {self._max_bad_fraction:.1%}): {'; '.join(self._damaged.lines())}; "
                "mend or remove them, or raise data.max_bad_fraction"
            )
