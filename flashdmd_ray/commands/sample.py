"""The command that draws images of prompts with any model: `flashdmd sample MODEL --prompts FILE --out FOLDER`.

Exit codes: 0 drawn, 1 failed, 2 a file or an option is wrong.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from flashdmd_ray.commands.workplace import add_workplace, announce, device_of, workplace
from flashdmd_ray.run.command_line import path_argument, run_command


def sample_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd sample MODEL --prompts FILE --out FOLDER [--steps N ...] [--guidance G ...] ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd sample",
        description="Draw images of prompts with a diffusers pipeline, an export or a LoRA, for `flashdmd score` and other judges.",
        epilog="Started again with the same options, it draws what is missing. See docs/evaluation.md.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of a text-to-image pipeline, or an export")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help=".txt, .jsonl or .parquet; dpg: a folder of .txt"
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="FOLDER")
    parser.add_argument("--lora", metavar="FILE", help="adapters to load into MODEL")
    parser.add_argument(
        "--steps", type=int, nargs="+", metavar="N", help="several make a folder each (default: the model's own)"
    )
    parser.add_argument("--guidance", type=float, nargs="+", metavar="G", help="several make a folder each")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels (default: the model's own)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts only")
    parser.add_argument(
        "--per-prompt", type=int, default=1, metavar="K", help="images of each prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, default=4, help="images at a time (default: %(default)s)")
    parser.add_argument(
        "--layout",
        choices=["pairs", "geneval", "dpg"],
        default="pairs",
        help="pairs: NNNNNN.png and its prompt. geneval: the folders GenEval's own tool reads, of its .jsonl file. "
        "dpg: also grids/ID.png for DPG-Bench, of its folder of prompts",
    )
    add_workplace(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _sample(options))


def _sample(options: argparse.Namespace) -> int:
    for name in ("limit", "per_prompt", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    model = Path(options.model)
    if model.exists() and not (model / "model_index.json").is_file():
        raise ValueError(
            f"{model}: not a pipeline of diffusers, it has no model_index.json; a run's student is its export folder"
        )
    prompts, metadata = _prompts(options)

    from flashdmd_ray.results.drawing import Drawing, Order, draw

    device = device_of(options)
    order = Order(prompts, options.per_prompt, options.layout, metadata)
    sweep = list(itertools.product(options.steps or [None], options.guidance or [None]))
    with workplace(options.runtime, gpus=0 if device == "cpu" else 1) as executor:
        for steps, guidance in sweep:
            size = None if options.size is None else tuple(options.size)
            drawing = Drawing(options.model, options.lora, steps, guidance, size, options.seed, options.dtype)
            out = options.out if len(sweep) == 1 else options.out / _name(steps, guidance)
            count = draw(drawing, order, out, executor, device, options.batch, options.workers, announce)
            announce(f"{out}: {count:,} images drawn, {len(order) - count:,} were there")
    return 0


def _name(steps: int | None, guidance: float | None) -> str:
    named = {"steps": steps, "guidance": guidance}
    return "_".join(f"{key}-{value:g}" for key, value in named.items() if value is not None)


def _prompts(options: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """The prompts, and for GenEval the lines of the file they are in, for DPG-Bench the names of theirs."""
    if options.layout == "dpg":
        return _prompts_of_folder(options)
    from flashdmd_ray.config import DataConfig
    from flashdmd_ray.data.datasets import open_indexed
    from flashdmd_ray.data.formats import Columns, open_prompts

    index = open_indexed(DataConfig(), open_prompts(options.prompts, Columns(), "--prompts"))
    index.tally.check(0.0, f"--prompts {options.prompts}")
    count = len(index) if options.limit is None else min(len(index), options.limit)
    if not count:
        raise ValueError(f"--prompts {options.prompts}: there are no prompts in it")
    metadata: list[str] = []
    if options.layout == "geneval":
        if Path(options.prompts).suffix != ".jsonl":
            raise ValueError("--layout geneval: --prompts must be GenEval's evaluation_metadata.jsonl")
        metadata = [line for line in Path(options.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    return index.captions(range(count)), metadata


def _prompts_of_folder(options: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """A prompt from each .txt of a folder, and the files' names."""
    files = sorted(Path(options.prompts).glob("*.txt"))[: options.limit]
    if not files:
        raise ValueError("--layout dpg: --prompts must be DPG-Bench's folder of prompts, a .txt for each")
    if options.per_prompt not in (1, 4):
        raise ValueError(f"--layout dpg: --per-prompt {options.per_prompt}: DPG-Bench reads 4 images of a prompt, or 1")
    prompts = [file.read_text(encoding="utf-8").strip() for file in files]
    if empty := [str(file) for file, prompt in zip(files, prompts, strict=True) if not prompt]:
        raise ValueError(f"--prompts: {empty[0]} is empty")
    return prompts, [file.stem for file in files]
