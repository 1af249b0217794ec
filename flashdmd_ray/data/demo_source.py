"""Digit scenes as a data set, composed when asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from flashdmd_ray.data.image_source import RealLatents, Reals
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.order import Order
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.data.waiting import waiting_for_data

REALS = "reals"


class DemoScenes:
    """Scenes of the train split, with their own captions as prompts or others. Other sizes than their canvas are interpolated."""

    def __init__(self, count: int, seed: int, prompts: Index | None = None) -> None:
        from flashdmd_ray.demo.scenes import sample_scenes

        self._scenes = sample_scenes(count, "train", seed)
        self._order = Order([count], seed)
        self._prompts = prompts
        self._prompt_order = self._order if prompts is None else Order([len(prompts)], seed)

    def __len__(self) -> int:
        return len(self._scenes)

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        chosen = self._prompt_order.samples(stream, positions.cpu().numpy()).tolist()
        if self._prompts is not None:
            return self._prompts.captions(chosen)
        return tuple(self._scenes[i].caption for i in chosen)

    def reals(self, positions: Tensor, size: tuple[int, int]) -> Reals:
        from flashdmd_ray.demo.scenes import CANVAS, render

        scenes = [self._scenes[i] for i in self._order.samples(REALS, positions.cpu().numpy()).tolist()]
        with waiting_for_data():
            images = render(scenes)[0]
        if size != (CANVAS, CANVAS):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return Reals(images, tuple(scene.caption for scene in scenes))

    def latents(self, positions: Tensor, size: tuple[int, int], encode: Callable[[Tensor], Tensor]) -> RealLatents:
        reals = self.reals(positions, size)
        return RealLatents(encode(reals.images), reals.captions)

    def report(self) -> Tally:
        return Tally()
