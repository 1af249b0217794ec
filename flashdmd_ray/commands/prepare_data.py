"""The command that judges a data set before a run, computes text embeddings and latents of it, and draws images of prompts.

Exit codes: 0 usable (or precomputed), 1 refused or failed, 2 there is no such data set or an option is wrong.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from flashdmd_ray.commands.workplace import workplace
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.data.executor import Executor
from flashdmd_ray.models.teacher_files import teacher_files
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.run.command_line import FAILED, add_set, path_argument, run_command


def prepare_data_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd data SOURCE [--check] [--embeddings] [--latents] [--teacher-images N] [--out DIR] ...`; returns the exit code."""
    options = _parse(arguments)
    return run_command(lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> int:
    config = _config(options)
    steps = [step for step in ("embeddings", "latents") if getattr(options, step)]
    images = options.teacher_images
    if images is not None and images < 2:
        raise ValueError(f"--teacher-images {images}: at least 2")
    if (steps or images) and options.out is None:
        raise ValueError("--out: name the folder that the computed files go to")
    if steps or images:
        teacher_files(config)
        try_loading(config)
    with workplace(options.runtime) as executor:
        return _run(config, options, steps, executor)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="flashdmd data",
        description="Judge a data set before a run (--check, what is done without other options), or precompute what a run reads of it.",
        epilog="Formats and keys are explained in docs/data.md.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="as data.source; or prompts: .txt, .jsonl, .parquet without images"
    )
    parser.add_argument("--check", action="store_true", help="decode every image and print a table and a verdict")
    parser.add_argument(
        "--embeddings", action="store_true", help="encode every distinct prompt and caption to OUT/embeddings"
    )
    parser.add_argument("--latents", action="store_true", help="encode every image with the VAE to OUT/latents")
    parser.add_argument(
        "--teacher-images",
        type=int,
        metavar="N",
        help="let the teacher draw N images of the prompts to OUT/images: real images where there are prompts alone",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="where computed files go; started again, it goes on"
    )
    parser.add_argument("--model", metavar="TEACHER", help="short for --set model.teacher=TEACHER")
    parser.add_argument(
        "--config",
        default="demo",
        metavar="CONFIG",
        help="a run's configuration or a preset; its model and data keys hold",
    )
    add_set(parser, "model.resolution=[512,512]")
    parser.add_argument("--workers", type=int, metavar="N", help="threads, or Ray actors (default: data.workers)")
    parser.add_argument(
        "--runtime",
        choices=["local", "ray"],
        default="local",
        help="ray: on the cluster of RAY_ADDRESS, through Ray Data",
    )
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> Config:
    is_prompts = _is_prompts(Path(os.path.expanduser(options.source)))
    settings = [*options.set, f"data.{'prompts' if is_prompts else 'source'}={options.source}"]
    if options.model is not None:
        settings.append(f"model.teacher={options.model}")
    if options.workers is not None:
        settings.append(f"data.workers={options.workers}")
    # What is computed here cannot be read yet, and where a run decodes is the run's business.
    return load_config(options.config, [*settings, "data.embeddings=null", "data.latents=null", "data.decode=threads"])


def _is_prompts(source: Path) -> bool:
    """True for prompts: a file that is called so, or tables without a column of images and nothing else beside them."""
    from flashdmd_ray.data.formats import PROMPTS, files_below, holds_images

    tables: tuple[Path, ...] = (source,) if source.suffix.lower() == ".parquet" and source.is_file() else ()
    if source.is_dir():
        found = files_below(source, ("",))
        tables = found if all(file.suffix.lower() == ".parquet" for file in found) else ()
    if tables:
        return not any(holds_images(table) for table in tables)
    return source.name.lower().endswith(PROMPTS)


def _run(config: Config, options: argparse.Namespace, steps: Sequence[str], executor: Executor) -> int:
    if options.check or not (steps or options.teacher_images):
        code = _check(config, executor)
        if code:
            return code
    if steps:
        _precompute(config, options.out, steps, executor)
    if options.teacher_images:
        from flashdmd_ray.commands.teacher_images import write_teacher_images

        folder = write_teacher_images(config, options.teacher_images, options.out, lambda line: print(line, flush=True))
        print(
            f"written; the discriminator learns from them with data.source={folder}: what the teacher draws is its measure then"
        )
    return 0


def _check(config: Config, executor: Executor) -> int:
    from flashdmd_ray.data.check import check_images, check_prompts, is_accepted, table
    from flashdmd_ray.data.datasets import named_datasets

    code = 0
    for key, format in named_datasets(config.data).items():
        is_source = key == "source"
        checked = check_images(config.data, executor) if is_source else check_prompts(config.data, format, executor)
        size = config.model.resolution if is_source else None
        print(
            "\n".join(
                [
                    getattr(config.data, key),
                    *(f"  {line}" for line in table(checked, size, config.data.max_bad_fraction)),
                ]
            )
        )
        if not is_accepted(checked, config.data.max_bad_fraction):
            code = FAILED
    return code


def _precompute(config: Config, out: Path, steps: Sequence[str], executor: Executor) -> None:
    from flashdmd_ray.data.precompute import precompute
    from flashdmd_ray.roles.networks import load_parts

    for what in steps:
        folder = precompute(what, config.data, config.model, out, executor, load_parts)
        print(f"{what} written; use them with data.{what}={folder}", flush=True)
