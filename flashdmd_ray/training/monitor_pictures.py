"""Pictures beside a verdict of the hack monitor: the same prompts and noise when preference training began, and now."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashdmd_ray.batch import from_uint8, to_uint8
from flashdmd_ray.results.grid import LARGE, write_grid
from flashdmd_ray.results.sample_grid import SampleGrid
from flashdmd_ray.roles.labels import student_label
from flashdmd_ray.run.files import new_file

FOLDER = "monitor"
"""Name of their folder in the run folder."""
START = "start.png"


class MonitorPictures:
    """Images for the prompts of the sample grids, with all denoising steps, and with the first two alone.

    Two steps are what a probe sees, and where damage shows first. The images of the beginning lie in the run folder without loss, one row
    of the file for each of the two, so that a resumed run compares with the same ones.
    """

    def __init__(self, folder: Path, grid: SampleGrid, timesteps: tuple[int, ...]) -> None:
        """timesteps: the generator's denoising timesteps."""
        self.folder = folder
        self.grid = grid
        self.samplers = tuple(dict.fromkeys((timesteps, timesteps[:2])))

    def keep_start(self) -> None:
        """Generate and keep the images of the beginning."""
        self.folder.mkdir(exist_ok=True)
        rows = [torch.cat(list(to_uint8(self._generate(timesteps))), dim=2) for timesteps in self.samplers]
        pixels = torch.cat(rows, dim=1).permute(1, 2, 0)
        with new_file(self.folder / START) as unfinished:
            Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(unfinished, format="PNG")

    def write(self, step: int) -> Path:
        """Write a grid of the beginning, if its file is still there, and of the generator after `step` steps; returns its path."""
        start = self._start(len(self.grid.texts))
        rows = []
        for index, timesteps in enumerate(self.samplers):
            if start is not None:
                rows.append((student_label("when preference training began", timesteps), start[index]))
            rows.append((student_label(f"after step {step}", timesteps), self._generate(timesteps)))
        self.folder.mkdir(exist_ok=True)
        return write_grid(self.folder / f"step-{step:06d}.png", rows, self.grid.texts)

    def _generate(self, timesteps: tuple[int, ...]) -> Tensor:
        """Images float (N, 3, H, W) in [-1, 1], no side longer than a grid shows."""
        images = self.grid.student_images(timesteps)
        longest = max(images.shape[-2:])
        if longest <= LARGE:
            return images
        return torch.nn.functional.interpolate(images, scale_factor=LARGE / longest, mode="area")

    def _start(self, count: int) -> Tensor | None:
        """Images of the beginning, float (samplers, N, 3, H, W) in [-1, 1]; None when their file is not there."""
        try:
            with Image.open(self.folder / START) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except OSError:
            return None
        rows = pixels.chunk(len(self.samplers), dim=1)
        return from_uint8(torch.stack([torch.stack(row.chunk(count, dim=2)) for row in rows]))
