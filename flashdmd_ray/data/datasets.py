"""The data sets that a configuration names, their indexes, and what is said about them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flashdmd_ray.config import Config, DataConfig
from flashdmd_ray.data.executor import Executor, in_threads
from flashdmd_ray.data.formats import Columns, ImageFormat, TextFormat, open_images, open_prompts
from flashdmd_ray.data.formats.hub import HubImages
from flashdmd_ray.data.index import Index, Scanned, default_cache, is_indexed, open_index, scan_here, scan_piece
from flashdmd_ray.data.manifest import check_stored
from flashdmd_ray.data.sample import Sample
from flashdmd_ray.data.tally import Tally

KEYS = ("source", "prompts")
"""Keys of the data sets that training reads."""


def named_datasets(config: DataConfig) -> dict[str, TextFormat]:
    """Data sets in files by their configuration key. Reads no sample. Raises ValueError when one is not there."""
    return {key: _format(config, key) for key in KEYS if _is_in_files(config, key)}


def _is_in_files(config: DataConfig, key: str) -> bool:
    return getattr(config, key) is not None and (key, config.source) != ("source", "demo")


def _format(config: DataConfig, key: str) -> TextFormat:
    assert config.prompts is not None or key == "source"
    return image_format(config) if key == "source" else open_prompts(str(config.prompts), Columns(config.caption))


def evaluation_prompts(path: str) -> TextFormat:
    """Open the prompts that `evaluation.prompts` names. Reads no prompt. Raises ValueError when it is not there."""
    return open_prompts(path, Columns(), "evaluation.prompts")


def data_faults(config: Config) -> list[str]:
    """List the faults of a configuration's data sets before they are indexed, one line each: absent, empty, another model's.

    Prompts of `evaluation.prompts` are all read, since a run would only meet them at its first grid or at its end.
    """
    data = config.data
    checks: list[Callable[[], object]] = [
        partial(_refuse_unusable, config, key) for key in KEYS if _is_in_files(data, key)
    ]
    checks += [partial(check_stored, config, what) for what in ("embeddings", "latents")]
    if config.evaluation.prompts is not None:
        checks.append(partial(check_prompts, "evaluation.prompts", config.evaluation.prompts, data.max_bad_fraction))
    faults = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    return faults


def _refuse_unusable(config: Config, key: str) -> None:
    """Raises ValueError for a data set that a run would refuse: without any sample, with too many bad ones, or images without captions.

    One that is not indexed is read up to its first sample. A hub's is left to the run.
    """
    data = config.data
    format = _format(data, key)
    if isinstance(format, HubImages):
        return
    if is_indexed(format, cache_folder(data)):
        index = accepted_index(data, key, format)
        if key == "source":
            refuse_missing_captions(config, index)
        return
    samples = (entry for piece in range(format.pieces()) for entry in format.scan(piece) if isinstance(entry, Sample))
    first = next(samples, None)
    if first is None:
        tally = Tally.merged(tally for _, tally in scan_here(format))
        raise ValueError(
            f"data.{key}: {getattr(data, key)} holds no usable sample ({tally.summary()}); name another, or mend it"
        )
    if not first.caption and _reads_captions(config):
        raise ValueError(f"data.source: {first.key} has no caption; {_captions_needed(config)}")


def refuse_missing_captions(config: Config, index: Index) -> None:
    """Raises ValueError where a discriminator reads captions that images lack: it would tell real images by the missing text."""
    missing = int((index.caption_lengths() == 0).sum())
    if missing and _reads_captions(config):
        raise ValueError(
            f"data.source: {missing:,} of {len(index):,} images have no caption; {_captions_needed(config)}"
        )


def _reads_captions(config: Config) -> bool:
    return config.adversarial.space == "latent" or config.adversarial.prompt_projection


def _captions_needed(config: Config) -> str:
    if config.adversarial.space == "latent":
        return "add captions (docs/data.md), or set adversarial.space to pixel, which reads none and needs Segment Anything"
    return "add captions (docs/data.md), or switch adversarial.prompt_projection off, which reads them"


def check_prompts(key: str, path: str, allowed: float, limit: str = "data.max_bad_fraction") -> None:
    """Read all prompts of a file. Raises ValueError when there is none, or more than a share of `allowed` are bad.

    key, limit: of the configuration, for the message.
    """
    tally = Tally.merged(tally for _, tally in scan_here(open_prompts(path, Columns(), key)))
    if not tally.good:
        raise ValueError(f"{key}: {path} holds no prompt ({tally.summary()}); name another file")
    tally.check(allowed, f"{key} {path}", limit)


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
    """Describe the data for `--dry-run`, a line for each data set; what is wrong with one is for `data_faults` to say."""
    lines = [f"source: {config.scenes:,} digit scenes of the train split"] if config.source == "demo" else []
    return lines + [
        f"{key}: {getattr(config, key)} ({_state(config, key)})" for key in KEYS if _is_in_files(config, key)
    ]


def _state(config: DataConfig, key: str) -> str:
    """Format and size of a data set, as far as they are known."""
    try:
        format = _format(config, key)
        if not is_indexed(format, cache_folder(config)):
            return f"{format.kind}, not indexed yet; flashdmd data --check judges it"
        index = open_indexed(config, format)
    except ValueError:
        return "not usable"
    ignored = sum(named.count for named in index.tally.ignored.values())
    state = f"{format.kind}, {len(index):,} samples, {index.tally.bad_count:,} bad"
    return f"{state}, {ignored:,} ignored" if ignored else state


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
