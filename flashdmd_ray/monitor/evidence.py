"""Pictures for whoever reads a verdict: the same prompts and noise when preference training began, and now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashdmd_ray.batch import from_uint8, to_uint8
from flashdmd_ray.grid import LARGE, write_grid
from flashdmd_ray.sheet import SampleSheet

FOLDER = "monitor"
"""In the run folder."""
START = "start.png"


class Evidence:
    """Draws what sample sheets draw, with the generator where it is trained. The pictures of the beginning lie in the run folder, side by
    side in one file without loss, so that a resumed run compares with the same ones."""

    def __init__(self, folder: Path, sheet: SampleSheet) -> None:
        self.folder = folder
        self.sheet = sheet

    def keep_start(self) -> None:
        """Draw the beginning."""
        self.folder.mkdir(exist_ok=True)
        images = to_uint8(self._draw())
        strip = torch.cat(list(images), dim=2).permute(1, 2, 0)
        unfinished = self.folder / f".{START}.tmp"
        Image.fromarray(np.ascontiguousarray(strip.numpy())).save(unfinished, format="PNG")
        unfinished.replace(self.folder / START)

    def write(self, step: int) -> Path:
        """A grid of the beginning, if its file is still there, above the generator as it is after `step` steps."""
        now = self._draw()
        rows = [(f"after {step} steps", now)]
        if (start := self._start(len(now))) is not None:
            rows.insert(0, ("when preference training began", start))
        self.folder.mkdir(exist_ok=True)
        return write_grid(self.folder / f"step-{step:06d}.png", rows, self.sheet.texts)

    def _draw(self) -> Tensor:
        """Float (N, 3, H, W) in [-1, 1], no side longer than a grid shows."""
        images = self.sheet.draw_student()
        longest = max(images.shape[-2:])
        if longest <= LARGE:
            return images
        return torch.nn.functional.interpolate(images, scale_factor=LARGE / longest, mode="area")

    def _start(self, count: int) -> Tensor | None:
        try:
            with Image.open(self.folder / START) as image:
                strip = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except OSError:
            return None
        return from_uint8(torch.stack(strip.chunk(count, dim=2)))
