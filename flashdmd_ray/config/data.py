"""Real images and prompts to train on."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from flashdmd_ray.config.section import Fraction, LocalPath, MayChange, PathOrName, PositiveInt, Section


class DataConfig(Section):
    source: PathOrName = "demo"
    """Captioned real images: 'demo' composes digit scenes of the train split; else a .tar or .parquet file, a folder of them, a folder of
    images with text files beside them or with metadata.jsonl or metadata.csv, a folder of datasets.save_to_disk, or
    hf:owner/name[:split]. See docs/data.md."""
    prompts: PathOrName | None = None
    """Prompts to train on: a .txt, .jsonl or .parquet file; null takes the captions of `source`. With prompts of their own, images need no
    captions."""
    scenes: PositiveInt = 20_000
    """How many distinct scenes the demo source holds."""
    caption: str | None = None
    """Column or JSON field of the caption, or suffix of the text file; null is the first of caption, text, prompt, txt with a text."""
    image: str | None = None
    """Column of the image in tables, suffix of the right image in archives and folders, column of file names in metadata files; null is the
    first usual one (image, jpg, ...), any image, file_name."""
    shuffle_blocks: PositiveInt | None = None
    """Shuffle this many blocks (archives, row groups) at a time, so that reading stays within them. null mixes everything, in parquet
    8 row groups, whose rows cannot be read alone."""
    max_bad_fraction: Fraction = 0.01
    """Share of bad samples (damaged, no caption, too large, ...) above which a run stops with a report. Bad ones are never used."""
    decode: MayChange[Literal["threads", "ray"]] = "threads"
    """threads: the process that trains on real images decodes them, ahead of itself. ray: Ray Data does, on any CPU of the cluster;
    the same images in the same order. Needs runtime 'ray'."""
    workers: MayChange[PositiveInt] = 2
    """Threads, or Ray tasks at a time, that decode in advance, for each process that trains on real images."""
    prefetch: MayChange[PositiveInt] = 2
    """Batches decoded in advance."""
    cache: MayChange[LocalPath | None] = None
    """Folder of the indexes of data sets; null is flashdmd_ray/data in the user's cache folder."""
    embeddings: LocalPath | None = None
    """Folder of text embeddings from flashdmd data --embeddings; prompts that are not in it are encoded as usual."""
    latents: LocalPath | None = None
    """Folder of latents of `source` from flashdmd data --latents, for real images that pass through the VAE's encoder."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.source == "demo" and self.latents is not None:
            raise ValueError("latents: the demo source composes its images anew; set latents to null")
        return self
