"""From the `data` section of a configuration to its source. Imports torch only to build one."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.ahead import ThreadDecoder
from flashdmd_ray.data.catalogue import image_format, judged_index, named
from flashdmd_ray.data.index import Index
from flashdmd_ray.data.source import ImageSource

if TYPE_CHECKING:
    from flashdmd_ray.data.files import FileImages


@lru_cache(maxsize=1)
def build_images(config: DataConfig, seed: int) -> ImageSource:
    """The data source of the configuration, made once per process.

    Raises ValueError, with the report, when it is unusable or more than `max_bad` of its samples are bad.
    """
    if config.source == "demo":
        from flashdmd_ray.data.demo import DemoScenes

        return DemoScenes(config.scenes, seed, _prompts(config))
    from flashdmd_ray.data.files import FileSource

    images = open_file_images(config, seed)
    prompts = images.index if config.prompts is None else _prompts(config)
    assert prompts is not None
    return FileSource(images, prompts, ThreadDecoder(images, config.workers, config.ahead), config.max_bad)


def open_file_images(config: DataConfig, seed: int) -> FileImages:
    """The real images alone, decoded when asked for. Raises ValueError like `build_images`."""
    from flashdmd_ray.data.files import FileImages

    format = image_format(config)
    return FileImages(format, judged_index(config, "source", format), seed, config.mix or format.mix)


def _prompts(config: DataConfig) -> Index | None:
    format = named(config).get("prompts")
    return None if format is None else judged_index(config, "prompts", format)
