"""Pictures for whoever reads a verdict: the same prompts and noise when preference training began, and now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashdmd_ray.batch import from_uint8, to_uint8
from flashdmd_ray.results.grid import LARGE, write_grid
from flashdmd_ray.results.sample_sheet import SampleSheet
from flashdmd_ray.roles.image_sampling import student_label
from flashdmd_ray.run.files import new_file

FOLDER = "monitor"
"""In the run folder."""
START = "start.png"


class Evidence:
    """Draws the prompts of the sample sheets with the generator where it is trained: with all its steps, and with the first two alone,
    which is what a probe sees and where damage shows first. The pictures of the beginning lie in the run folder without loss, one row of
    the file for each, so that a resumed run compares with the same ones."""

    def __init__(self, folder: Path, sheet: SampleSheet, timesteps: tuple[int, ...]) -> None:
        """timesteps: the generator's denoising timesteps."""
        self.folder = folder
        self.sheet = sheet
        self.samplers = tuple(dict.fromkeys((timesteps, timesteps[:2])))

    def keep_start(self) -> None:
        """Draw the beginning."""
        self.folder.mkdir(exist_ok=True)
        rows = [torch.cat(list(to_uint8(self._draw(timesteps))), dim=2) for timesteps in self.samplers]
        pixels = torch.cat(rows, dim=1).permute(1, 2, 0)
        with new_file(self.folder / START) as unfinished:
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(unfinished, format="PNG")

    def write(self, step: int) -> Path:
        """A grid of the beginning, if its file is still there, and of the generator as it is after `step` steps."""
        began = self._start(len(self.sheet.texts))
        rows = []
        for index, timesteps in enumerate(self.samplers):
            if began is not None:
                rows.append((student_label("when preference training began", timesteps), began[index]))
            rows.append((student_label(f"after step {step}", timesteps), self._draw(timesteps)))
        self.folder.mkdir(exist_ok=True)
        return write_grid(self.folder / f"step-{step:06d}.png", rows, self.sheet.texts)

    def _draw(self, timesteps: tuple[int, ...]) -> Tensor:
        """Float (N, 3, H, W) in [-1, 1], no side longer than a grid shows."""
        images = self.sheet.draw_student(timesteps)
        longest = max(images.shape[-2:])
        if longest <= LARGE:
            return images
        return torch.nn.functional.interpolate(images, scale_factor=LARGE / longest, mode="area")

    def _start(self, count: int) -> Tensor | None:
        """Float (samplers, N, 3, H, W) in [-1, 1]."""
        try:
            with Image.open(self.folder / START) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except OSError:
            return None
        rows = pixels.chunk(len(self.samplers), dim=1)
        return from_uint8(torch.stack([torch.stack(row.chunk(count, dim=2)) for row in rows]))
