"""Digit scenes: sampled, captioned, parsed and rendered.

A scene has one or two handwritten digits, each in one of six colours, on one of three backgrounds. With two digits
the caption names the first, the relation and the second. The canvas is 24x24; positions and sizes are in its pixels,
(0, 0) is the top left corner.

Train and held-out scenes share no digit image (stratified by class) and no two-digit caption. All randomness comes
from explicit seeds.
"""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from flashdmd_ray.batch import from_uint8, to_uint8

Split = Literal["train", "held_out"]

CANVAS = 24
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.15, 0.30, 0.95),
    "yellow": (0.98, 0.78, 0.05),
    "purple": (0.72, 0.15, 0.85),
    "cyan": (0.05, 0.78, 0.85),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.03, 0.03, 0.03),
    "gray": (0.38, 0.38, 0.38),
    "white": (0.97, 0.97, 0.97),
}
# Unit vector (x, y) from the second digit to the first.
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

SINGLE_SHARE = 0.4
HELD_OUT_SHARE = 0.2
_CAPTION_BUCKETS = 8  # one bucket in eight of the two-digit captions is held out
_SPLIT_SEED = 20251120


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit's attributes; this is all that a caption says about it."""

    digit: int
    colour: str


@dataclass(frozen=True, slots=True)
class SceneAttributes:
    """Content of a caption. `relation` is None for a single digit, else a key of RELATIONS."""

    digits: tuple[Digit, ...]
    relation: str | None
    background: str

    @property
    def caption(self) -> str:
        first = f"a {self.digits[0].colour} {self.digits[0].digit}"
        if self.relation is None:
            return f"{first} on a {self.background} background"
        second = f"a {self.digits[1].colour} {self.digits[1].digit}"
        return f"{first} {self.relation} {second} on a {self.background} background"


@dataclass(frozen=True, slots=True)
class Placement:
    """One handwritten digit (index into load_digits) in the scene: centre and side of its square box, in pixels."""

    image_index: int
    centre_x: float
    centre_y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Attributes plus one placement per digit: everything that `render` needs."""

    attributes: SceneAttributes
    placements: tuple[Placement, ...]

    @property
    def caption(self) -> str:
        return self.attributes.caption


@functools.cache
def _digit_images() -> torch.Tensor:
    """(1797, 8, 8) float32 ink coverage in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images.astype(np.float32) / 16.0)


@functools.cache
def digit_indices(split: Split) -> tuple[np.ndarray, ...]:
    """For each class 0..9 the indices into load_digits of that split, ascending. The two splits are disjoint."""
    from sklearn.datasets import load_digits

    target = load_digits().target
    classes = []
    for digit in range(10):
        indices = np.flatnonzero(target == digit)
        order = np.random.default_rng((_SPLIT_SEED, digit)).permutation(len(indices))
        held_out = round(len(indices) * HELD_OUT_SHARE)
        part = order[:held_out] if split == "held_out" else order[held_out:]
        classes.append(np.sort(indices[part]))
    return tuple(classes)


def caption_is_held_out(attributes: SceneAttributes) -> bool:
    """True for the two-digit captions whose hash holds them out; the few single-digit captions appear on both sides."""
    return attributes.relation is not None and zlib.crc32(attributes.caption.encode()) % _CAPTION_BUCKETS == 0


def _sample_attributes(rng: np.random.Generator, split: Split) -> SceneAttributes:
    colours, backgrounds, relations = list(COLOURS), list(BACKGROUNDS), list(RELATIONS)
    single = rng.random() < SINGLE_SHARE
    while True:
        d0, d1, c0, c1, b, r = rng.integers((10, 10, len(colours), len(colours), len(backgrounds), len(relations)))
        digits = (Digit(int(d0), colours[c0]), Digit(int(d1), colours[c1]))
        if single:
            return SceneAttributes(digits[:1], None, backgrounds[b])
        attributes = SceneAttributes(digits, relations[r], backgrounds[b])
        if caption_is_held_out(attributes) == (split == "held_out"):
            return attributes


def place(attributes: SceneAttributes, split: Split, rng: np.random.Generator) -> Scene:
    """Draw handwriting of `split`, position and size for given attributes.

    Two digits have a 12-pixel slot each and leave at least one free pixel between their boxes; a single digit may be a
    little larger and moves more freely around the centre.
    """
    half = CANVAS / 2
    placements = []
    for slot, item in enumerate(attributes.digits):
        indices = digit_indices(split)[item.digit]
        alone = attributes.relation is None
        size = rng.uniform(10.0, 12.0) if alone else rng.uniform(9.0, 10.5)
        slack = 2.0 if alone else (half - 1 - size) / 2
        dx, dy = rng.uniform(-slack, slack, size=2)
        x = y = half
        if attributes.relation is not None:
            direction = RELATIONS[attributes.relation]
            sign = 1 if slot == 0 else -1
            x += sign * direction[0] * half / 2
            y += sign * direction[1] * half / 2
        index = int(indices[rng.integers(len(indices))])
        placements.append(Placement(index, float(x + dx), float(y + dy), float(size)))
    return Scene(attributes, tuple(placements))


def sample_scenes(count: int, split: Split, seed: int) -> list[Scene]:
    """`count` scenes of a split; the same arguments give the same scenes."""
    rng = np.random.default_rng((seed, 0 if split == "train" else 1))
    return [place(_sample_attributes(rng, split), split, rng) for _ in range(count)]


_ONE = rf"a ({'|'.join(COLOURS)}) ([0-9])"
_CAPTION = re.compile(rf"^{_ONE}(?: ({'|'.join(RELATIONS)}) {_ONE})? on a ({'|'.join(BACKGROUNDS)}) background$")


def parse_caption(text: str) -> SceneAttributes:
    """Attributes that a caption states; the exact inverse of `SceneAttributes.caption`.

    Raises ValueError for any text outside the grammar.
    """
    match = _CAPTION.match(" ".join(text.lower().split()))
    if match is None:
        raise ValueError(
            f"not a digit-scene caption: {text!r}; the form is 'a <colour> <digit> [left of|right of|above|below"
            f" a <colour> <digit>] on a <background> background' with colours {', '.join(COLOURS)} and backgrounds"
            f" {', '.join(BACKGROUNDS)}"
        )
    c0, d0, relation, c1, d1, background = match.groups()
    digits = (Digit(int(d0), c0),) if relation is None else (Digit(int(d0), c0), Digit(int(d1), c1))
    return SceneAttributes(digits, relation, background)


def _ink(scenes: list[Scene], canvas: int) -> torch.Tensor:
    """(B, 2, canvas, canvas) float32 ink coverage of each digit; zero where a scene has no second digit."""
    count = len(scenes)
    index = torch.zeros(count, 2, dtype=torch.long)
    box = torch.tensor([0.0, 0.0, 1.0]).repeat(count, 2, 1)  # centre x, centre y, size
    present = torch.zeros(count, 2, dtype=torch.bool)
    for row, scene in enumerate(scenes):
        for slot, p in enumerate(scene.placements):
            index[row, slot] = p.image_index
            box[row, slot] = torch.tensor([p.centre_x, p.centre_y, p.size])
            present[row, slot] = True
    box = box.view(-1, 3) * (canvas / CANVAS)
    pixel = torch.arange(canvas, dtype=torch.float32) + 0.5
    grid_x = (pixel[None, :] - box[:, 0:1]) / (box[:, 2:3] / 2)
    grid_y = (pixel[None, :] - box[:, 1:2]) / (box[:, 2:3] / 2)
    grid = torch.stack(torch.broadcast_tensors(grid_x[:, None, :], grid_y[:, :, None]), dim=-1)
    glyphs = _digit_images()[index.view(-1)].unsqueeze(1)
    ink = F.grid_sample(glyphs, grid, mode="bicubic", padding_mode="zeros", align_corners=False)[:, 0]
    ink = ((ink - 0.15) * 1.6).clamp(0, 1)  # the enlarged strokes keep crisp edges
    return ink.view(count, 2, canvas, canvas) * present[:, :, None, None]


def render(scenes: list[Scene], *, canvas: int = CANVAS) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, canvas, canvas) float32 in [-1, 1] and masks (B, 2, canvas, canvas) bool, one per digit.

    The mask of an absent second digit is all False.
    """
    ink = _ink(scenes, canvas)
    paints = torch.zeros(len(scenes), 3, 3)  # (B, background | first | second, RGB)
    for row, scene in enumerate(scenes):
        paints[row, 0] = torch.tensor(BACKGROUNDS[scene.attributes.background])
        for slot, item in enumerate(scene.attributes.digits):
            paints[row, slot + 1] = torch.tensor(COLOURS[item.colour])
    image = paints[:, 0, :, None, None].expand(-1, -1, canvas, canvas)
    for slot in range(2):
        coverage = ink[:, slot : slot + 1]
        image = image * (1 - coverage) + paints[:, slot + 1, :, None, None] * coverage
    return image * 2 - 1, ink > 0.5


@dataclass(frozen=True, slots=True)
class Pool:
    """Pre-rendered scenes: images uint8 (N, 3, 24, 24), masks bool (N, 2, 24, 24) and captions."""

    images: torch.Tensor
    masks: torch.Tensor
    captions: list[str]

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Images of these rows, float32 in [-1, 1]."""
        return from_uint8(self.images[index])


def make_pool(count: int, split: Split, seed: int) -> Pool:
    scenes = sample_scenes(count, split, seed)
    images, masks = render(scenes)
    return Pool(to_uint8(images), masks, [scene.caption for scene in scenes])
