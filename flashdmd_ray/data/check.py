"""A verdict on a data set before a run: every image decoded, every caption measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.datasets import image_format, open_indexed
from flashdmd_ray.data.executor import Executor, ranges
from flashdmd_ray.data.formats import ImageFormat, TextFormat
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.order import Integers
from flashdmd_ray.data.pixels import decode
from flashdmd_ray.data.sample import UNKNOWN_LOSS, Bad, BadSample
from flashdmd_ray.data.tally import Tally

DECODED = (64, 64)
"""Every byte of an image is read at any size; a small one costs least."""
AT_ONCE = 64

SHAPES = (
    ("tall, below 1:2", 0.5),
    ("1:2 to 3:4", 0.75),
    ("3:4 to 4:3", 4 / 3),
    ("4:3 to 2:1", 2.0),
    ("wide, above 2:1", np.inf),
)


@dataclass(frozen=True)
class CheckResult:
    """Findings of a check. tally: of the index and of decoding together."""

    kind: str
    index: Index
    tally: Tally


def check_images(config: DataConfig, executor: Executor) -> CheckResult:
    """Index the real images and decode every one. Raises ValueError when there is no usable sample."""
    format = image_format(config)
    index = open_indexed(config, format, executor)
    tally = Tally()
    tally.merge(index.tally)
    make_worker = partial(Decoding, format, config)
    for damaged in executor(make_worker, ranges(len(index), AT_ONCE), config.workers):
        for bad in damaged:
            tally.spoil(bad)
    return CheckResult(format.kind, index, tally)


def check_prompts(config: DataConfig, format: TextFormat, executor: Executor) -> CheckResult:
    """Index prompts. Raises ValueError when there is none."""
    index = open_indexed(config, format, executor)
    return CheckResult(format.kind, index, index.tally)


class Decoding:
    """Decodes a range of samples and gives back the bad ones."""

    def __init__(self, format: ImageFormat, config: DataConfig) -> None:
        self.format = format
        self.index = open_indexed(config, format)

    def __call__(self, bounds: tuple[int, int]) -> list[Bad]:
        damaged = []
        for number in range(*bounds):
            sample = self.index.sample(number)
            try:
                decode(self.format.read(sample), DECODED)
            except BadSample as error:
                damaged.append(Bad(sample.key, error.reason))
        return damaged


def table(checked: CheckResult, size: tuple[int, int] | None, max_bad_fraction: float) -> list[str]:
    """Table that `--check` prints. size: (H, W) of the run, None where it is not known; then nothing is said about enlarging."""
    tally, index = checked.tally, checked.index
    lines = [f"format      {checked.kind}", f"samples     {tally.samples:,}, of which {tally.bad_count:,} bad"]
    sizes = index.sizes()
    if sizes.any():
        lines += _pictures(sizes, size)
    long = sum(named.count for note, named in tally.notes.items() if note.startswith("caption longer"))
    lines.append(
        f"captions    {_range(index.caption_lengths())} characters"
        + (f"; {long:,} long ones, which tokenizers cut" if long else "")
    )
    lines += [f"bad         {line}" for line in tally.lines()]
    lines += [f"ignored     {line}" for line in tally.ignored_lines()]
    lines += [f"note        {line}" for line in tally.note_lines()]
    lines.append(f"verdict     {verdict(checked, max_bad_fraction)}")
    return lines


def is_accepted(checked: CheckResult, max_bad_fraction: float) -> bool:
    """True where a run would take it."""
    tally = checked.tally
    return tally.bad_count <= max_bad_fraction * tally.samples and not any(
        reason in tally.bad for reason in UNKNOWN_LOSS
    )


def verdict(checked: CheckResult, max_bad_fraction: float) -> str:
    """One line."""
    tally = checked.tally
    if any(reason in tally.bad for reason in UNKNOWN_LOSS):
        reasons = " and ".join(reason for reason in UNKNOWN_LOSS if reason in tally.bad)
        return f"refused: {reasons}: nobody knows how much is lost; make or fetch it again"
    if not is_accepted(checked, max_bad_fraction):
        share = tally.bad_count / tally.samples
        return f"refused: {share:.1%} bad, allowed {max_bad_fraction:.1%}; mend or remove them, or raise data.max_bad_fraction"
    return "usable" + (f": {tally.bad_count:,} bad samples will be left out or replaced" if tally.bad_count else "")


def _pictures(sizes: Integers, size: tuple[int, int] | None) -> list[str]:
    width, height = sizes[:, 0], sizes[:, 1]
    lines = [f"width       {_range(width)} pixels", f"height      {_range(height)} pixels"]
    ratio = width / height
    counts, below = [], 0
    for name, limit in SHAPES:
        upto = int((ratio <= limit).sum())
        counts.append((name, upto - below))
        below = upto
    lines.append("shapes      " + ", ".join(f"{name}: {count:,}" for name, count in counts if count))
    if size is not None:
        wanted = size[1] / size[0]
        kept = np.minimum(ratio / wanted, wanted / ratio)
        small = int(((width < size[1]) | (height < size[0])).sum())
        lines.append(
            f"at {size[1]} x {size[0]}".ljust(12)
            + f"{kept.mean():.0%} of an image is left by the crop; {small:,} must be enlarged"
        )
    return lines


def _range(values: Integers | Sequence[int]) -> str:
    low, middle, high = np.percentile(np.asarray(values), [0, 50, 100])
    return f"{low:,.0f} to {high:,.0f}, median {middle:,.0f}"
