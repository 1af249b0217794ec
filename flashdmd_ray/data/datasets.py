"""The data sets that a configuration names, their indexes, and what is said about them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flashdmd_ray.config import DataConfig
from flashdmd_ray.data.executor import Executor, in_threads
from flashdmd_ray.data.formats import Columns, ImageFormat, TextFormat, open_images, open_prompts
from flashdmd_ray.data.index import Index, Scanned, default_cache, is_indexed, open_index, scan_piece


def named_datasets(config: DataConfig) -> dict[str, TextFormat]:
    """Data sets in files by their configuration key. Reads no sample. Raises ValueError when one is not there."""
    found: dict[str, TextFormat] = {}
    if config.source != "demo":
        found["source"] = image_format(config)
    if config.prompts is not None:
        found["prompts"] = open_prompts(config.prompts, Columns(config.caption))
    return found


def evaluation_prompts(path: str) -> TextFormat:
    """Open the prompts that `evaluation.prompts` names. Reads no prompt. Raises ValueError when it is not there."""
    return open_prompts(path, Columns(), "evaluation.prompts")


def image_format(config: DataConfig) -> ImageFormat:
    """The format of the real images. Raises ValueError when they are not there."""
    return open_images(config.source, columns(config))


def columns(config: DataConfig) -> Columns:
    """Names of the caption and the image; images need no captions where the prompts are others."""
    return Columns(config.caption, config.image, captionless=config.prompts is not None)


def open_indexed(config: DataConfig, format: TextFormat, executor: Executor = in_threads) -> Index:
    """The index of a data set, bad or not; made where `executor` does its work when it is not in the cache."""
    return open_index(format, cache_folder(config), partial(_scan, executor=executor, workers=config.workers))


def _scan(format: TextFormat, executor: Executor, workers: int) -> Iterator[Scanned]:
    return executor(partial(_scanner, format), range(format.pieces()), workers)


def _scanner(format: TextFormat) -> Callable[[int], Scanned]:
    return partial(scan_piece, format)


def accepted_index(config: DataConfig, key: str, format: TextFormat) -> Index:
    """The index of the data set called `key`. Raises ValueError when more than `max_bad_fraction` of its samples are bad."""
    index = open_indexed(config, format)
    index.tally.check(config.max_bad_fraction, f"data.{key} {getattr(config, key)}")
    return index


def describe_data(config: DataConfig) -> list[str]:
    """Describe the data for `--dry-run`, a line for each data set. Raises ValueError for one that is not there."""
    lines = [f"source: {config.scenes:,} digit scenes of the train split"] if config.source == "demo" else []
    for key, format in named_datasets(config).items():
        cache = cache_folder(config)
        if is_indexed(format, cache):
            index = open_indexed(config, format)
            ignored = sum(named.count for named in index.tally.ignored.values())
            state = f"{len(index):,} samples, {index.tally.bad_count:,} bad" + (
                f", {ignored:,} ignored" if ignored else ""
            )
        else:
            state = "not indexed yet; flashdmd data --check judges it"
        lines.append(f"{key}: {getattr(config, key)} ({format.kind}, {state})")
    return lines


def data_report(config: DataConfig) -> dict[str, dict[str, Any]]:
    """Findings of indexing by key: path, kind, a digest of the content, samples seen, and bad ones by reason."""
    found = {}
    for key, format in named_datasets(config).items():
        index = open_indexed(config, format)
        facts = {"path": getattr(config, key), "kind": format.kind, "content": index.content}
        found[key] = facts | index.tally.as_json()
    return found


def cache_folder(config: DataConfig) -> Path:
    """Folder of the indexes."""
    return default_cache() if config.cache is None else config.cache
