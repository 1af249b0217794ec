"""The pairs that a latent reward is trained on and measured with: decoded, in an order that is a function of the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flashdmd_ray.batch import from_uint8
from flashdmd_ray.data.formats.pairs import PairFormat, open_pairs
from flashdmd_ray.data.image_reader import first_decodable
from flashdmd_ray.data.index import Index, default_cache, open_index
from flashdmd_ray.data.order import Integers, Order
from flashdmd_ray.data.pixels import Pixels, decode
from flashdmd_ray.data.prefetch import Decoded, Size, ThreadDecoder
from flashdmd_ray.data.sample import Bad, Sample
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.reward_training.config import PairsConfig

TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one text each.

    images: float32 (B, 2, 3, H, W) in [-1, 1]. labels: float32 (B,), how much the first is preferred, 0 to 1. truth: labels as they were
    before rewards judged; the same where nobody did.
    """

    images: Tensor
    texts: tuple[str, ...]
    labels: Tensor
    truth: Tensor


class PairFiles:
    """One part of the pairs: those of training, or the held-out ones."""

    def __init__(
        self, format: PairFormat, index: Index, rows: Integers, size: Size, seed: int, config: PairsConfig
    ) -> None:
        """rows: which pairs of the index. size: (H, W) that images are decoded to."""
        self.format, self.index, self.rows, self.size = format, index, rows, size
        blocks = index.table.column("block").to_numpy()[rows]
        self._order = Order(np.bincount(blocks).tolist(), seed, format.shuffle_blocks)
        self._decoder = ThreadDecoder(self, config.workers, config.prefetch)
        self.met: list[Bad] = []
        """Pairs that turned out to be damaged when they were decoded; the next one took their place."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Tensor) -> Pairs:
        """The pairs at `positions`, int64 (B,), of the order of this part."""
        return self._pairs(self._decoder.take(positions.tolist(), self.size))

    def first(self, count: int) -> Integers:
        """The first so many of this part's pairs in a mixed order, int64 (<= count,), for `at`."""
        return self._order.samples("measure", np.arange(min(count, len(self))))

    def at(self, numbers: Sequence[int]) -> Pairs:
        """Pairs by their number in this part."""
        return self._pairs([self.find(number, self.size) for number in numbers])

    def numbers(self, positions: Sequence[int]) -> list[int]:
        numbers: list[int] = self._order.samples(TRAIN, np.array(positions, dtype=np.int64)).tolist()
        return numbers

    def find(self, number: int, size: Size) -> Decoded:
        """Both images of a pair, uint8 (2, H, W, 3), or of the next that can be decoded. Raises ValueError when none near can."""
        near = (int(self.rows[(number + step) % len(self)]) for step in range(len(self)))
        return first_decodable(self.index, near, lambda sample: self._decoded(sample, size), "pairs.source")

    def _decoded(self, sample: Sample, size: Size) -> Pixels:
        return np.stack([decode(data, size) for data in self.format.read(sample)])

    def _pairs(self, decoded: Sequence[Decoded]) -> Pairs:
        self.met += [bad for one in decoded for bad in one.bad if bad not in self.met]
        pixels = torch.from_numpy(np.stack([one.pixels for one in decoded])).permute(0, 1, 4, 2, 3)
        labels = torch.tensor([self.format.labels(self.index.sample(one.sample)) for one in decoded])
        texts = self.index.captions([one.sample for one in decoded])
        return Pairs(from_uint8(pixels), texts, labels[:, 0], labels[:, 1])


@dataclass(frozen=True)
class PairData:
    """Both parts, and what indexing counted."""

    train: PairFiles
    held_out: PairFiles
    tally: Tally


def open_pair_data(config: PairsConfig, source: str, size: Size, seed: int) -> PairData:
    """The pairs of a file, a folder or a dataset; a folder with the folders 'train' and 'held_out' is split as it says, others by prompt.

    Raises ValueError, with the report, when more than `max_bad_fraction` of the rows are bad, or a part has none.
    """
    folder, tally = Path(source), Tally()
    if (folder / TRAIN).is_dir():
        parts = {}
        for name in (TRAIN, HELD_OUT):
            format = open_pairs(str(folder / name))
            index = _indexed(config, format, str(folder / name), tally)
            parts[name] = PairFiles(format, index, np.arange(len(index)), size, seed, config)
        return PairData(parts[TRAIN], parts[HELD_OUT], tally)
    format = open_pairs(source)
    index = _indexed(config, format, source, tally)
    held_out = np.array([is_held_out(text, config.held_out) for text in index.table.column("caption").to_pylist()])
    parts = {}
    for name, mask in ((TRAIN, ~held_out), (HELD_OUT, held_out)):
        if not mask.any():
            nothing = "to train on" if name == TRAIN else "held out"
            raise ValueError(
                f"pairs.held_out: {config.held_out:g} of the prompts of {source} leaves no pair {nothing}; "
                "choose another share, or more pairs"
            )
        parts[name] = PairFiles(format, index, np.flatnonzero(mask), size, seed, config)
    return PairData(parts[TRAIN], parts[HELD_OUT], tally)


def is_held_out(text: str, share: float) -> bool:
    """Decide by a hash of the prompt whether its pairs are held out: no prompt is on both sides, on any machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _indexed(config: PairsConfig, format: PairFormat, where: str, tally: Tally) -> Index:
    cache = default_cache() if config.cache is None else config.cache
    index = open_index(format, cache)
    index.tally.check(config.max_bad_fraction, f"pairs.source {where}", "pairs.max_bad_fraction")
    tally.merge(index.tally)
    return index
