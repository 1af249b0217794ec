"""A row of a table, wherever it is kept: the columns that make a sample, and what is wrong with one."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashdmd_ray.data.formats.base import CAPTIONS, IMAGES, Columns, choose, is_filled
from flashdmd_ray.data.pixels import image_facts
from flashdmd_ray.data.sample import Bad, BadSample, Sample, read_caption


@dataclass(frozen=True)
class Row:
    """The columns of the caption, of the encoded images, and of the labels of a pair."""

    caption: str
    images: tuple[str, ...]
    labels: tuple[str, ...] = ()
    captionless: bool = False

    @property
    def names(self) -> list[str]:
        return [*([self.caption] if self.caption else []), *self.images, *self.labels]

    def sample(
        self, key: str, values: Mapping[str, Any], block: int, offset: int, image_bytes: Callable[[Any], bytes]
    ) -> Sample | Bad:
        """One row's values as a sample, with the size of its first image."""
        try:
            caption, remarks = read_caption(values[self.caption], self.captionless) if self.caption else ("", ())
            if self.labels:
                check_labels([values[name] for name in self.labels])
            encoded = [image_bytes(values[name]) for name in self.images]
            facts = [image_facts(io.BytesIO(data), len(data)) for data in encoded]
        except BadSample as bad:
            return Bad(key, bad.reason)
        first, all_remarks = facts[0], (*remarks, *(remark for one in facts for remark in one.remarks))
        return Sample(key, caption, block, offset, sum(map(len, encoded)), first.width, first.height, all_remarks)


def captioned(columns: Columns, present: Sequence[str], where: object, head: Sequence[Mapping[str, Any]]) -> Row:
    """A caption and one image. head: the first rows. Raises ValueError naming the columns there are."""
    filled = {name for row in head for name, value in row.items() if is_filled(value)}
    images = {name for row in head for name, value in row.items() if value is not None}
    image = choose(columns.image, IMAGES, present, "data.image", where, images)
    if columns.captionless and columns.caption is None and not set(CAPTIONS) & set(present):
        return Row("", (image,), captionless=True)
    caption = choose(columns.caption, CAPTIONS, present, "data.caption", where, filled)
    return Row(caption, (image,), captionless=columns.captionless)


def check_labels(labels: Sequence[Any]) -> None:
    """Raises BadSample unless they are two shares of one: Pick-a-Pic has rows that nobody judged."""
    try:
        first, second = (float(label) for label in labels)
    except (TypeError, ValueError):
        raise BadSample("no label") from None
    if not (0 <= first <= 1 and abs(first + second - 1) < 1e-6):
        raise BadSample("no label")
