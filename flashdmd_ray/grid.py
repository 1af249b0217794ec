"""A picture that a person can judge: one row per sampler, one column per prompt, captions above."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, MARGIN, LABELS = 120, 8, 12, 150
FONT_SIZE, LINE = 13, 16
CAPTION_CHARACTERS, LABEL_CHARACTERS = 19, 22
INK, PAPER = (30, 30, 30), (255, 255, 255)


def draw_grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Image.Image:
    """rows: a label and images float (N, 3, H, W) in [-1, 1] each, one image per caption.

    Small images are enlarged by a whole factor, pixel by pixel; large ones are reduced.
    """
    assert all(len(images) == len(captions) for _, images in rows), "one image per caption in each row"
    font = ImageFont.load_default(FONT_SIZE)
    headings = [textwrap.wrap(caption, CAPTION_CHARACTERS) or [""] for caption in captions]
    cell = _cell_size(rows[0][1])
    top = MARGIN + LINE * max(len(lines) for lines in headings) + GAP
    width = MARGIN + LABELS + len(captions) * (cell + GAP) - GAP + MARGIN
    canvas = Image.new("RGB", (width, top + len(rows) * (cell + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(headings):
        x = MARGIN + LABELS + column * (cell + GAP)
        _write(draw, lines, x, top - GAP - LINE * len(lines), font)
    for row, (label, images) in enumerate(rows):
        y = top + row * (cell + GAP)
        lines = textwrap.wrap(label, LABEL_CHARACTERS)
        _write(draw, lines, MARGIN, y + (cell - LINE * len(lines)) // 2, font)
        for column, image in enumerate(images):
            canvas.paste(_enlarge(image, cell), (MARGIN + LABELS + column * (cell + GAP), y))
    return canvas


def write_grid(path: Path, rows: Sequence[tuple[str, Tensor]], captions: Sequence[str]) -> Path:
    """`draw_grid` as a PNG file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    draw_grid(rows, captions).save(unfinished, format="PNG")
    unfinished.replace(path)
    return path


def _cell_size(images: Tensor) -> int:
    """The whole multiple of the image's side nearest below CELL, or CELL itself for larger images."""
    side = images.shape[-1]
    return CELL // side * side or CELL


def _enlarge(image: Tensor, cell: int) -> Image.Image:
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    filtering = Image.Resampling.NEAREST if cell % picture.width == 0 else Image.Resampling.LANCZOS
    return picture.resize((cell, cell), filtering)


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + LINE * number), line, fill=INK, font=font)
