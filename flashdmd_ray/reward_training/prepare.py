"""Pairs that have to be made or judged before training, written in Pick-a-Pic's columns into the run folder, a table at a time.

A table that is there is not made again: the same command goes on where it stopped.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from flashdmd_ray.batch import to_uint8
from flashdmd_ray.data.formats.pairs import CAPTION, IMAGES, LABELS, TRUTH
from flashdmd_ray.models.family import Family
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.made_pairs import HELD_OUT_SCENES, Make, demo_pairs, drawn_pairs
from flashdmd_ray.reward_training.pairs import HELD_OUT, TRAIN, PairFiles, Pairs, open_pair_data
from flashdmd_ray.reward_training.verdicts import judge, load_judges, verdicts
from flashdmd_ray.run.files import new_file

TABLE = 1024
"""Pairs in a table; its row groups have a quarter of them."""

Say = Callable[[str], None]


def prepare_pairs(config: RewardTrainingConfig, folder: Path, load: Callable[[], Family], say: Say) -> str:
    """Return the place of the pairs to train on: `pairs.source`, or tables below `folder`; those that are missing are made now.

    load: gives the model family, asked for only where images are made or judged. Raises ValueError for sources that cannot be used.
    """
    pairs = config.pairs
    if not pairs.is_made and pairs.labels == "given":
        return pairs.source
    family = load()
    rate = _judging(config, family) if pairs.labels == "rewards" else _as_given
    for name, make, count in _parts(config, family):
        dropped = 0
        for number, start in enumerate(range(0, count, TABLE)):
            path = folder / name / f"pairs-{number:05}.parquet"
            if not path.is_file():
                rows = min(TABLE, count - start)
                dropped += _write(path, rate(make(start, rows)))
                say(f"pairs: {name} {start + rows:,} of {count:,}")
        if dropped:
            say(f"pairs: {dropped:,} of {count:,} left out: a reward was not finite")
        if dropped > pairs.max_bad_fraction * count:
            raise ValueError(
                f"rewards: {dropped:,} of {count:,} pairs got a reward that is not finite (allowed {pairs.max_bad_fraction:.1%}); "
                "look at the reward's input and type, or raise pairs.max_bad_fraction"
            )
    return str(folder if (folder / TRAIN).is_dir() else folder / "all")


def _parts(config: RewardTrainingConfig, family: Family) -> Iterator[tuple[str, Make, int]]:
    pairs, seed = config.pairs, config.seed
    if pairs.source == "demo":
        yield TRAIN, demo_pairs(TRAIN, seed), pairs.count
        yield HELD_OUT, demo_pairs(HELD_OUT, seed), min(HELD_OUT_SCENES, max(pairs.count // 5, 64))
    elif pairs.is_made:
        yield "all", drawn_pairs(config, family), pairs.count
    else:
        data = open_pair_data(pairs, pairs.source, family.image_size, seed)
        for name, part in ((TRAIN, data.train), (HELD_OUT, data.held_out)):
            yield name, _given(part), len(part)


def _given(part: PairFiles) -> Make:
    return lambda start, count: part.at(range(start, start + count))


def _as_given(pairs: Pairs) -> Pairs:
    return pairs


def _judging(config: RewardTrainingConfig, family: Family) -> Callable[[Pairs], Pairs]:
    judging = [reward for reward in config.rewards if not reward.held_out]
    judges = load_judges(judging, family.device)
    weights = {reward.label: reward.weight for reward in judging}

    def rate(pairs: Pairs) -> Pairs:
        chunks = zip(pairs.images.split(64), _chunks(pairs.texts, 64), strict=True)
        rated = [judge(judges, images.to(family.device), texts) for images, texts in chunks]
        labels = verdicts({name: torch.cat([each[name] for each in rated]) for name in weights}, weights)
        return Pairs(pairs.images, pairs.texts, labels, pairs.truth)

    return rate


def _chunks(texts: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _write(path: Path, pairs: Pairs) -> int:
    """Write a table in one rename; returns how many pairs have no label and were left out."""
    import pyarrow as pa
    import pyarrow.parquet

    usable = torch.isfinite(pairs.labels)
    rows: list[dict[str, Any]] = []
    for row in usable.nonzero()[:, 0].tolist():
        label, truth = float(pairs.labels[row]), float(pairs.truth[row])
        images = {name: _png(pairs.images[row, which]) for which, name in enumerate(IMAGES)}
        labels = {LABELS[0]: label, LABELS[1]: 1 - label}
        rows.append({CAPTION: pairs.texts[row], **images, **labels, TRUTH: label if np.isnan(truth) else truth})
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        (CAPTION, pa.string()),
        *((n, pa.binary()) for n in IMAGES),
        *((n, pa.float64()) for n in (*LABELS, TRUTH)),
    ]
    table = pa.Table.from_pylist(rows, pa.schema(columns))
    with new_file(path) as unfinished:
        pyarrow.parquet.write_table(table, unfinished, row_group_size=TABLE // 4)
    return int((~usable).sum())


def _png(image: torch.Tensor) -> bytes:
    """A lossless file of an image float (3, H, W) in [-1, 1]."""
    pixels = to_uint8(image).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
