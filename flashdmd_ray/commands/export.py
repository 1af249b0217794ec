"""The command that exports a run's student: `flashdmd export RUN [--format FORMAT] [--checkpoint STEP] [--out DIRECTORY]`.

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

Format = Literal["pipeline", "lora", "kohya"]
FOLDERS: Mapping[Format, str] = {"pipeline": "export", "lora": "lora", "kohya": "kohya"}
"""Forms of an export, and where in the run folder each lies."""


def export_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd export RUN [--format FORMAT] [--checkpoint STEP] [--out DIRECTORY]`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flashdmd export",
        description="Write the student of a run's checkpoint as a diffusers pipeline or a LoRA file.",
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
        help="pipeline: the whole model. lora, kohya: the adapter of a LoRA run, for diffusers or for ComfyUI (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="DIRECTORY", type=path_argument, help="where to (default: RUN/export, RUN/lora or RUN/kohya)"
    )
    options = parser.parse_args(arguments)

    def work() -> int:
        export_run(options.run, options.checkpoint, options.out, options.format)
        return 0

    return run_command(work)


def export_run(run: Path, which: str, out: Path | None, form: Format = "pipeline") -> Path:
    """Export the checkpoint `which` ('best', 'latest', 'healthy' or a step); returns the directory.

    Raises ValueError when there is no such checkpoint, when it is damaged, when `out` is taken, or for a LoRA format of another run.
    """
    config = read_run_config(run)
    if form != "pipeline" and "generator" not in config.lora.networks:
        raise ValueError(
            f"--format {form}: the generator of {run} was trained whole, it has no adapter; use --format pipeline"
        )

    from flashdmd_ray.checkpoint import Best, read_state, select_checkpoint
    from flashdmd_ray.models.trial_loading import try_loading
    from flashdmd_ray.results.export import check_target, export_pipeline
    from flashdmd_ray.results.lora_export import export_lora
    from flashdmd_ray.results.report import card_facts
    from flashdmd_ray.results.student import saved_weights, student_weights
    from flashdmd_ray.roles.networks import load_family

    out = out or run / FOLDERS[form]
    check_target(out, form, config.model.family)
    checkpoint = select_checkpoint(checkpoint_root(config, run), which, Best.from_config(config.checkpoint))
    training = read_state(checkpoint)
    facts = card_facts(config, training, *_reported(run, config, training))
    try_loading(config)
    family, timesteps = load_family(config.model), config.sampling.timesteps
    if form == "pipeline":
        written = export_pipeline(family, student_weights(config, family, checkpoint), timesteps, out, facts)
    else:
        written = export_lora(family, config.lora, saved_weights(checkpoint), timesteps, out, facts, form)
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
