"""A picture that a person can judge: one row per sampler, one column per prompt, captions above."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flashdmd_ray.batch import to_uint8
from flashdmd_ray.run.files import new_file

CELL, LARGE, GAP, MARGIN, LABELS = 120, 256, 8, 12, 150
FONT_SIZE, LINE = 13, 16
CAPTION_CHARACTERS, CAPTION_LINES, LABEL_CHARACTERS = 19, 12, 22
INK, PAPER = (30, 30, 30), (255, 255, 255)


def draw_grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Image.Image:
    """rows: a label and images float (N, 3, H, W) in [-1, 1] each, one image per caption.

    Small images are enlarged by a whole factor, pixel by pixel; large ones are reduced. The aspect ratio stays.
    """
    assert all(len(images) == len(captions) for _, images in rows), "one image per caption in each row"
    font = ImageFont.load_default(FONT_SIZE)
    cell_width, cell_height = _cell_size(rows[0][1])
    characters = CAPTION_CHARACTERS * cell_width // CELL
    headings = [textwrap.wrap(caption, characters, max_lines=CAPTION_LINES) or [""] for caption in captions]
    top = MARGIN + LINE * max(len(lines) for lines in headings) + GAP
    width = MARGIN + LABELS + len(captions) * (cell_width + GAP) - GAP + MARGIN
    canvas = Image.new("RGB", (width, top + len(rows) * (cell_height + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        x = MARGIN + LABELS + column * (cell_width + GAP)
        _write(draw, lines, x, top - GAP - LINE * len(lines), font)
    for row, (label, images) in enumerate(rows):
        y = top + row * (cell_height + GAP)
        lines = textwrap.wrap(label, LABEL_CHARACTERS)
        _write(draw, lines, MARGIN, y + (cell_height - LINE * len(lines)) // 2, font)
        for column, image in enumerate(images):
            x = MARGIN + LABELS + column * (cell_width + GAP)
            canvas.paste(_enlarge(image, cell_width, cell_height), (x, y))
    return canvas


def write_grid(path: Path, rows: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Path:
    """`draw_grid` as a PNG file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as unfinished:
        draw_grid(rows, captions).save(unfinished, format="PNG")
    return path


def _cell_size(images: Tensor) -> tuple[int, int]:
    """Width and height: the whole multiple of a small image nearest below CELL, or a large one with its longer side at most LARGE."""
    height, width = images.shape[-2:]
    longest = max(height, width)
    scale = CELL // longest if longest <= CELL else min(1.0, LARGE / longest)
    return max(1, round(scale * width)), max(1, round(scale * height))


def _enlarge(image: Tensor, width: int, height: int) -> Image.Image:
    pixels = to_uint8(image).cpu()
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    filtering = Image.Resampling.NEAREST if width % picture.width == 0 else Image.Resampling.LANCZOS
    return picture.resize((width, height), filtering)


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + LINE * number), line, fill=INK, font=font)
