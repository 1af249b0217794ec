"""Before a version is served: it draws once in every size, which warms it up, and its batch sizes are measured."""

from __future__ import annotations

from typing import Any

import torch

from flashdmd_ray.serving.catalogue import Version
from flashdmd_ray.serving.numerics import agreeing_sizes, shapes_of
from flashdmd_ray.serving.student import Artist, Sample, Size, Student

PROMPT, SEED = "a rehearsal", 7


class Rehearsal:
    """Remembers what it measured: a new version of a model has the shapes of the old."""

    def __init__(self, most: int) -> None:
        """most: samples in one forward."""
        self._most = most
        self._measured: dict[Any, tuple[int, ...]] = {}

    def __call__(self, version: Version) -> None:
        """Draw with every artist. Raises ValueError when one cannot, or draws values that are no numbers."""
        for name, artist in version.artists.items():
            artist.reads_groups = _reads_groups(artist)
            for size in version.infos[name].sizes:
                artist.batches[size] = self._batches(artist, size)
            _draw(name, artist, artist.step_counts[0] if isinstance(artist, Student) else 2)

    def _batches(self, artist: Artist, size: Size) -> tuple[int, ...]:
        modules = {"network": artist.network.network, "vae": artist.family.vae}
        key = (type(artist), size, artist.family.device, shapes_of(modules))
        if key not in self._measured:
            self._measured[key] = agreeing_sizes(lambda count: _bits(artist, size, count), self._most)
        return self._measured[key]


def _bits(artist: Artist, size: Size, count: int) -> bytes | None:
    """Of one sample after one step, among others, as the first and as the last of a batch; None when the two differ."""
    seeds = [SEED, *range(count - 2), SEED][:count]
    samples = [artist.begin(PROMPT, seed, 1, size) for seed in seeds]
    latents = artist.step(samples)
    done = [Sample(s.conditioning, s.generator, s.timesteps, row, 1) for s, row in zip(samples, latents, strict=True)]
    images = artist.pixels(done)
    same = torch.equal(latents[0], latents[-1]) and torch.equal(images[0], images[-1])
    return latents[0].cpu().numpy().tobytes() + images[0].numpy().tobytes() if same else None


@torch.no_grad()
def _reads_groups(artist: Artist) -> bool:
    towers = artist.family.text
    others = [f"{PROMPT} {i}" for i in range(towers.GROUP - 1)]
    first, last = towers.encode_group([PROMPT, *others]), towers.encode_group([*others, PROMPT])
    alone = towers.encode_group([PROMPT, *[""] * len(others)])
    return all(torch.equal(a[0], b[-1]) and torch.equal(a[0], c[0]) for a, b, c in zip(first, last, alone, strict=True))


def _draw(name: str, artist: Artist, steps: int) -> None:
    sample = artist.begin(PROMPT, SEED, steps, artist.family.image_size)
    while not sample.finished:
        artist.advance([sample])
    if not bool(torch.isfinite(sample.noisy).all()):
        raise ValueError(f"{name} draws values that are not finite: its weights are damaged; export it again")
    artist.decode([sample])
