"""The command that exports a run's student: `flashdmd export RUN [--format FORMAT] [--dtype TYPE] [--push-to-hub REPOSITORY] ...`.

Exit codes: 0 done, 1 failed, 2 the folder or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from flashdmd_ray.config import Config
from flashdmd_ray.run.command_line import path_argument, run_command
from flashdmd_ray.run.folder import read_run_config
from flashdmd_ray.run.storage import checkpoint_root

Format = Literal["pipeline", "single-file", "lora", "kohya"]
FOLDERS: Mapping[Format, str] = {"pipeline": "export", "single-file": "single_file", "lora": "lora", "kohya": "kohya"}
"""Forms of an export, and where in the run folder each lies."""
DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Short names of types."""


def export_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd export RUN [--format FORMAT] [--dtype TYPE] [--push-to-hub REPOSITORY] ...`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd export",
        description="Write the student of a run's checkpoint as a diffusers pipeline, one file for ComfyUI and A1111, or a LoRA.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="folder of a training run, for example runs/demo"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="best|latest|healthy|STEP",
        help="best: by the run's checkpoint.best_metric; healthy: the newest that the hack monitor found so (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        default="pipeline",
        choices=FOLDERS,
        help="pipeline, single-file: the whole model, for diffusers or in the original layout. lora, kohya: the adapter of a LoRA run, for "
        "diffusers or for ComfyUI (default: %(default)s)",
    )
    parser.add_argument(
        "--single-file",
        dest="format",
        action="store_const",
        const="single-file",
        help="the same as --format single-file",
    )
    parser.add_argument(
        "--dtype",
        type=lambda name: DTYPES.get(name, name),
        choices=list(DTYPES.values()),
        help="of the weights, fp16 and bf16 for short (default: the one they were trained in)",
    )
    parser.add_argument(
        "--out",
        metavar="DIRECTORY",
        type=path_argument,
        help="where to (default: RUN/export, RUN/export_fp16, RUN/lora, ...)",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="REPOSITORY",
        help="upload it too, as owner/name, with the account of `hf auth login` or HF_TOKEN",
    )
    parser.add_argument("--private", action="store_true", help="the repository, if the push makes it")
    options = parser.parse_args(arguments)
    if options.private and options.push_to_hub is None:
        parser.error("--private goes with --push-to-hub")
    return run_command(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    from flashdmd_ray.results.hub import check_account, push_folder

    repository = options.push_to_hub
    if repository is not None:
        check_account(repository)
    written = export_run(options.run, options.checkpoint, options.out, options.format, options.dtype)
    if repository is not None:
        push_folder(written, repository, options.private)
        print(f"pushed to {repository}")
    return 0


def export_run(run: Path, which: str, out: Path | None, form: Format = "pipeline", dtype: str | None = None) -> Path:
    """Export the checkpoint `which` ('best', 'latest', 'healthy' or a step); returns the directory.

    dtype: name of a torch type, or None for that of training. Raises ValueError when there is no such checkpoint, when it is damaged, when
    `out` is taken, for a LoRA format of another run, or for values that dtype does not hold.
    """
    config = read_run_config(run)
    if form in ("lora", "kohya") and "generator" not in config.lora.networks:
        raise ValueError(
            f"--format {form}: the generator of {run} was trained whole, it has no adapter; use --format pipeline"
        )

    import torch

    from flashdmd_ray.checkpoint import Best, read_state, select_checkpoint
    from flashdmd_ray.models.trial_loading import try_loading
    from flashdmd_ray.results.export import check_target, export_pipeline, export_single_file
    from flashdmd_ray.results.lora_export import export_lora
    from flashdmd_ray.results.report import card_facts
    from flashdmd_ray.results.student import saved_weights, student_weights
    from flashdmd_ray.roles.networks import load_family

    short = next((f"_{name}" for name, long in DTYPES.items() if long == dtype and name != "fp32"), "")
    out = out or run / f"{FOLDERS[form]}{short}"
    check_target(out, form, config.model.family)
    checkpoint = select_checkpoint(checkpoint_root(config, run), which, Best.from_config(config.checkpoint))
    training = read_state(checkpoint)
    facts = card_facts(config, training, *_reported(run, config, training))
    try_loading(config)
    family, timesteps = load_family(config.model), config.sampling.timesteps
    kind = None if dtype is None else getattr(torch, dtype)
    if form == "lora" or form == "kohya":
        weights = saved_weights(checkpoint)
        written = export_lora(family, config.lora, weights, timesteps, out, facts, form, kind or torch.float32)
    else:
        export_whole = export_single_file if form == "single-file" else export_pipeline
        written = export_whole(family, student_weights(config, family, checkpoint), timesteps, out, facts, kind)
    print(f"{checkpoint.name} written to {written}")
    return written


def _reported(run: Path, config: Config, training: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[str]]:
    """The table measured at the end of training, without rows unless they are of this very checkpoint, and the grid's prompts."""
    from flashdmd_ray.results.evaluation_data import choose_prompts, has_exact_judge
    from flashdmd_ray.results.report import grid_seed
    from flashdmd_ray.results.sample_grid import COLUMNS

    report: dict[str, Any] = {}
    with suppress(OSError, json.JSONDecodeError):
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if "grid" not in report:
        # Digit scenes are composed anew; the prompts of other data may not be on this machine.
        return {"rows": []}, choose_prompts(config, COLUMNS, grid_seed(config)) if has_exact_judge(config) else ()
    if report["training"]["step"] != training["step"]:
        return {"rows": []}, report["grid"]
    return {name: report[name] for name in ("rows", "prompts", "space", "optimised") if name in report}, report["grid"]
