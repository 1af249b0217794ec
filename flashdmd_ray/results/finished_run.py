"""Commands on a run folder after training: evaluate the student again, export it again. Nothing is trained.

Exit codes are those of the training command: 0 done, 1 failed, 2 the folder or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flashdmd_ray.config import Config, load_config
from flashdmd_ray.results.export_facts import FACTS
from flashdmd_ray.run.command_line import run_command
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.storage import Location, checkpoint_root

if TYPE_CHECKING:
    from torch import Tensor

    from flashdmd_ray.models.family import Family

EVALUATION = "evaluation.json"
Format = Literal["pipeline", "lora", "kohya"]
FOLDERS: Mapping[Format, str] = {"pipeline": "export", "lora": "lora", "kohya": "kohya"}
"""Forms of an export, and where in the run folder each lies."""


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """`evaluate.py RUN [--samples N] [--seed S]`: the table of teacher and student, also written to RUN/evaluation.json."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Compare a run's student with its teacher on held-out prompts and noise."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a training run, for example runs/demo")
    parser.add_argument("--samples", type=int, default=2000, help="held-out prompts per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of prompts and noise (default: the run's own)")
    options = parser.parse_args(arguments)

    def work() -> int:
        evaluate_run(options.run, options.samples, options.seed)
        return 0

    return run_command(work)


def export_command(arguments: Sequence[str] | None = None) -> int:
    """`export.py RUN [--format FORMAT] [--checkpoint best|latest|healthy|STEP] [--out DIRECTORY]`: a checkpoint's student for others."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write the student of a run's checkpoint as a diffusers pipeline or a LoRA file."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a training run, for example runs/demo")
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
        "--out", metavar="DIRECTORY", type=Path, help="where to (default: RUN/export, RUN/lora or RUN/kohya)"
    )
    options = parser.parse_args(arguments)

    def work() -> int:
        export_run(options.run, options.checkpoint, options.out, options.format)
        return 0

    return run_command(work)


def evaluate_run(run: Path, samples: int, seed: int | None) -> Mapping[str, object]:
    """Print the table and write it as JSON; returns it. Raises ValueError when `run` holds no student, or nothing can judge it."""
    config = read_run_config(run)
    if samples < 2:
        raise ValueError(f"--samples {samples}: a Frechet distance needs at least 2")
    if seed is not None and seed < 0:
        raise ValueError(f"--seed {seed}: must not be negative")
    seed = config.seed if seed is None else seed
    config = config.model_copy(
        update={"seed": seed, "evaluation": config.evaluation.model_copy(update={"samples": samples})}
    )
    source = find_student(run, config)

    import torch

    from flashdmd_ray.results.evaluation import as_json, print_table
    from flashdmd_ray.results.report import compare, judging_family
    from flashdmd_ray.roles.networks import load_student

    torch.set_num_threads(config.placement.threads)
    print(f"evaluating {source}", flush=True)
    family = judging_family(config)
    student = load_student(family, read_student(source, config, family))
    compared = compare(config, family, student, lambda text: print(text, flush=True))
    if compared is None:
        raise ValueError(f"{run}: nothing judges its images; configure a pixel reward in {run / 'config.yaml'}")
    print_table(compared)
    table = as_json(compared)
    name = source.relative_to(run) if isinstance(source, Path) and source.is_relative_to(run) else source
    facts = {"student": str(name), "samples": samples, "seed": seed} | table
    write_atomically(run / EVALUATION, json.dumps(facts, indent=1) + "\n")
    print(f"written to {run / EVALUATION}")
    return table


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
    from flashdmd_ray.results.export import export_pipeline
    from flashdmd_ray.results.lora_export import export_lora
    from flashdmd_ray.results.report import card_facts, saved_weights, student_weights
    from flashdmd_ray.roles.networks import load_family

    checkpoint = select_checkpoint(checkpoint_root(config, run), which, Best.from_config(config.checkpoint))
    training = read_state(checkpoint)
    facts = card_facts(config, training, *_reported(run, config, training))
    family = load_family(config.model)
    out, timesteps = out or run / FOLDERS[form], config.sampling.timesteps
    if form == "pipeline":
        written = export_pipeline(family, student_weights(config, family, checkpoint), timesteps, out, facts)
    else:
        written = export_lora(family, config.lora, saved_weights(checkpoint), timesteps, out, facts, form)
    print(f"{checkpoint.name} written to {written}")
    return written


def read_run_config(run: Path) -> Config:
    """The configuration a run was started with. Raises ValueError when `run` is no run folder."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is no run folder (it has no config.yaml): give one such as runs/demo")
    return load_config(run / "config.yaml")


def find_student(run: Path, config: Config) -> Location:
    """The run's export, or its newest complete checkpoint while it has none. Raises ValueError when it has neither."""
    from flashdmd_ray.checkpoint import latest_checkpoint

    if (run / "export" / FACTS).is_file():
        return run / "export"
    checkpoint = latest_checkpoint(checkpoint_root(config, run))
    if checkpoint is None:
        raise ValueError(f"{run} has neither an export nor a complete checkpoint: train it to its first one")
    return checkpoint


def read_student(source: Location, config: Config, family: Family) -> Mapping[str, Tensor]:
    """The student's whole weights in an export or a checkpoint. Raises ValueError when they are damaged."""
    from flashdmd_ray.models import family_class
    from flashdmd_ray.results.report import student_weights

    if (source / FACTS).exists():
        return family_class(config.model.family).from_pretrained(str(source), parts=["denoiser"]).teacher.state_dict()
    return student_weights(config, family, source)


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
