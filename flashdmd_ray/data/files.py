"""Prompts and real images from files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flashdmd_ray.data.ahead import Decoded, Decoder, Size
from flashdmd_ray.data.formats import ImageFormat
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.order import Order
from flashdmd_ray.data.pixels import decode
from flashdmd_ray.data.precomputed import StoredLatents
from flashdmd_ray.data.samples import Bad, BadSample, Tally
from flashdmd_ray.data.source import RealLatents, Reals

log = logging.getLogger(__name__)

REALS = "reals"
LONGEST_SEARCH = 100
"""Bad samples in a row after which there is no point in looking on."""
ENOUGH = 100
"""Images decoded before the share of bad ones says anything."""


class FileImages:
    """Real images of a data set. What an index cannot know, that a body is damaged, is found when it is decoded.

    Such a sample is replaced by the next one of the index that can be decoded, wherever and whenever that is done, so
    batches keep their size and do not depend on who decodes.
    """

    def __init__(self, format: ImageFormat, index: Index, seed: int, mix: int | None) -> None:
        self.format = format
        self.index = index
        self.order = Order(index.block_sizes.tolist(), seed, mix)

    def __len__(self) -> int:
        return len(self.index)

    def numbers(self, positions: Sequence[int]) -> list[int]:
        """The samples at these positions of the stream of real images."""
        found: list[int] = self.order.samples(REALS, np.array(positions, dtype=np.int64)).tolist()
        return found

    def find(self, number: int, size: Size) -> Decoded:
        """The image of sample `number`, or of the next one that can be decoded. Raises ValueError when there is none near."""
        bad: list[Bad] = []
        for step in range(min(LONGEST_SEARCH, len(self.index))):
            current = (number + step) % len(self.index)
            sample = self.index.sample(current)
            try:
                pixels = decode(self.format.read(sample), size)
            except BadSample as error:
                bad.append(Bad(sample.key, error.reason))
                continue
            return Decoded(pixels, current, tuple(bad))
        raise ValueError(
            f"data.source: {len(bad)} samples in a row cannot be decoded, from {bad[0].key} ({bad[0].reason}) "
            f"to {bad[-1].key}; run jobs/prepare_data.py --check"
        )


class FileSource:
    """See `ImageSource`."""

    def __init__(
        self,
        images: FileImages,
        prompts: Index,
        decoder: Decoder,
        max_bad: float,
        stored: StoredLatents | None = None,
    ) -> None:
        self.images = images
        self.decoder = decoder
        self._prompts = prompts
        self._prompt_order = Order([len(prompts)], images.order.seed)
        self._max_bad = max_bad
        self._stored = stored
        self._met = Tally()
        self._known: set[Bad] = set()
        self._replaced = 0

    def __len__(self) -> int:
        return len(self.images)

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        return self._prompts.captions(self._prompt_order.samples(stream, positions.numpy()).tolist())

    def reals(self, positions: Tensor, size: Size) -> Reals:
        """Raises ValueError, with the report, when more than data.max_bad of the images decoded so far were bad."""
        decoded = self.decoder.take(positions.tolist(), size)
        self._count(decoded)
        pixels = torch.from_numpy(np.stack([d.pixels for d in decoded])).permute(0, 3, 1, 2)
        captions = self.images.index.captions([d.sample for d in decoded])
        return Reals(pixels.float() / 127.5 - 1, captions, sum(bool(d.bad) for d in decoded))

    def latents(self, positions: Tensor, size: Size, encode: Callable[[Tensor], Tensor]) -> RealLatents:
        if self._stored is None:
            reals = self.reals(positions, size)
            return RealLatents(encode(reals.images), reals.captions, reals.replaced)
        wanted = self.images.numbers(positions.tolist())
        values, samples = self._stored.rows(wanted)
        replaced = sum(a != b for a, b in zip(samples, wanted, strict=True))
        return RealLatents(values, self.images.index.captions(samples), replaced)

    def report(self) -> Tally:
        return self._met

    def _count(self, decoded: Sequence[Decoded]) -> None:
        self._met.seen += len(decoded)
        self._replaced += sum(bool(one.bad) for one in decoded)
        for bad in (bad for one in decoded for bad in one.bad if bad not in self._known):
            self._known.add(bad)
            self._met.note_bad(bad)
            if bad.key in self._met.bad[bad.reason].names:
                log.warning("%s: %s; the next image takes its place", bad.key, bad.reason)
        if self._met.seen >= ENOUGH and self._replaced > self._max_bad * self._met.seen:
            raise ValueError(
                f"data.source: {self._replaced} of {self._met.seen} images could not be decoded "
                f"({self._replaced / self._met.seen:.1%}, allowed {self._max_bad:.1%}): {'; '.join(self._met.lines())}; "
                "mend or remove them, or raise data.max_bad"
            )
