"""From the `data` section of a configuration to its source. Imports torch only to build one."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from flashdmd_ray.config import Config, DataConfig
from flashdmd_ray.data.datasets import accepted_index, image_format, named_datasets, refuse_missing_captions
from flashdmd_ray.data.image_reader import BatchReader, ImageReader
from flashdmd_ray.data.image_source import ImageSource
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.prefetch import Size, ThreadDecoder

if TYPE_CHECKING:
    from flashdmd_ray.models.family import Family


@lru_cache(maxsize=1)
def build_images(config: DataConfig, seed: int) -> ImageSource:
    """The data source of the configuration, made once per process.

    Raises ValueError, with the report, when it is unusable or more than `max_bad_fraction` of its samples are bad.
    """
    if config.source == "demo":
        from flashdmd_ray.data.demo_source import DemoScenes

        return DemoScenes(config.scenes, seed, open_prompt_index(config))
    from flashdmd_ray.data.file_source import FileSource

    images = open_image_reader(config, seed)
    prompts = images.index if config.prompts is None else open_prompt_index(config)
    assert prompts is not None
    return FileSource(images, prompts, ThreadDecoder(images, config.workers, config.prefetch), config.max_bad_fraction)


def open_reals(config: Config, family: Family) -> ImageSource:
    """`build_images` for a role that reads real images, with the stored latents of the configuration.

    Raises ValueError when they were made for another model, resolution or data set, or captions are missing that the role reads.
    """
    source = build_images(config.data, config.seed)
    if isinstance(images := getattr(source, "images", None), ImageReader):
        refuse_missing_captions(config, images.index)
    if config.data.latents is None:
        return source
    from flashdmd_ray.data.file_source import FileSource
    from flashdmd_ray.data.precomputed import open_latents

    assert isinstance(source, FileSource), "the configuration refuses latents of the demo source"
    source.stored = open_latents(config.data.latents, family, config.model, source.images.index.content)
    return source


def open_image_reader(config: DataConfig, seed: int) -> ImageReader:
    """The real images alone, decoded when asked for. Raises ValueError like `build_images`."""
    format = image_format(config)
    return ImageReader(
        format, accepted_index(config, "source", format), seed, config.shuffle_blocks or format.shuffle_blocks
    )


def open_prompt_index(config: DataConfig) -> Index | None:
    """The prompts of their own, None where the captions of the real images serve. Raises ValueError like `build_images`."""
    format = named_datasets(config).get("prompts")
    return None if format is None else accepted_index(config, "prompts", format)


def open_batch_reader(config: DataConfig, seed: int, size: Size) -> BatchReader:
    """Open what a worker process needs to decode batches of positions."""
    return BatchReader(open_image_reader(config, seed), size)
