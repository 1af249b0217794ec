"""Real images from files, decoded when asked for. No torch: worker processes that only decode start quickly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flashdmd_ray.data.formats import ImageFormat
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.order import Order
from flashdmd_ray.data.pixels import Pixels, decode
from flashdmd_ray.data.prefetch import Decoded, Size
from flashdmd_ray.data.sample import Bad, BadSample, Sample

REALS = "reals"
LONGEST_SEARCH = 100
"""Bad samples in a row after which there is no point in looking on."""


class ImageReader:
    """Real images of a data set. What an index cannot know, that a body is damaged, is found when it is decoded.

    Such a sample is replaced by the next one of the index that can be decoded, wherever and whenever that is done, so
    batches keep their size and do not depend on who decodes.
    """

    def __init__(self, format: ImageFormat, index: Index, seed: int, shuffle_blocks: int | None) -> None:
        self.format = format
        self.index = index
        self.order = Order(index.block_sizes.tolist(), seed, shuffle_blocks)

    def __len__(self) -> int:
        return len(self.index)

    def numbers(self, positions: Sequence[int]) -> list[int]:
        """The samples at these positions of the stream of real images."""
        found: list[int] = self.order.samples(REALS, np.array(positions, dtype=np.int64)).tolist()
        return found

    def find(self, number: int, size: Size) -> Decoded:
        """The image of sample `number`, or of the next one that can be decoded. Raises ValueError when there is none near."""
        near = ((number + step) % len(self) for step in range(len(self)))
        return first_decodable(self.index, near, lambda sample: decode(self.format.read(sample), size), "data.source")


def first_decodable(index: Index, numbers: Iterable[int], read: Callable[[Sample], Pixels], key: str) -> Decoded:
    """The first of these samples of the index that `read` can decode. Raises ValueError, naming `key`, after LONGEST_SEARCH bad ones."""
    bad: list[Bad] = []
    for number in itertools.islice(numbers, LONGEST_SEARCH):
        sample = index.sample(number)
        try:
            return Decoded(read(sample), number, tuple(bad))
        except BadSample as error:
            bad.append(Bad(sample.key, error.reason))
    raise ValueError(
        f"{key}: {len(bad)} samples in a row cannot be decoded, from {bad[0].key} ({bad[0].reason}) to {bad[-1].key}; "
        "mend or remove them (flashdmd data --check names all that are bad)"
    )


class BatchReader:
    """Decodes the images at positions, in a worker process."""

    def __init__(self, images: ImageReader, size: Size) -> None:
        self._images = images
        self._size = size

    def __call__(self, positions: Sequence[int]) -> list[Decoded]:
        return [self._images.find(number, self._size) for number in self._images.numbers(positions)]
