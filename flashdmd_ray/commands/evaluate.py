"""The command that evaluates a run's student again: `flashdmd evaluate RUN [--samples N] [--seed S]`.

Exit codes: 0 done, 1 failed, 2 the folder or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flashdmd_ray.data.datasets import data_faults
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.run.command_line import path_argument, run_command
from flashdmd_ray.run.files import write_atomically
from flashdmd_ray.run.folder import read_run_config

EVALUATION = "evaluation.json"


def evaluate_command(arguments: Sequence[str] | None = None) -> int:
    """`flashdmd evaluate RUN [--samples N] [--seed S]`: the table of teacher and student, also written to RUN/evaluation.json."""
    parser = argparse.ArgumentParser(
        prog="flashdmd evaluate", description="Compare a run's student with its teacher on held-out prompts and noise."
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="folder of a training run, for example runs/demo"
    )
    parser.add_argument("--samples", type=int, default=2000, help="held-out prompts per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of prompts and noise (default: the run's own)")
    options = parser.parse_args(arguments)

    def work() -> int:
        evaluate_run(options.run, options.samples, options.seed)
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
    if config.data.source != "demo" or config.evaluation.prompts is not None:
        data = config.data.model_copy(update={"embeddings": None, "latents": None})  # read by training alone
        if faults := data_faults(config.model_copy(update={"data": data})):
            raise ValueError("\n".join(faults))
    from flashdmd_ray.results.comparison import compare, judging_family, pixel_rewards
    from flashdmd_ray.results.evaluation import as_json, print_table
    from flashdmd_ray.results.student import find_student, read_student
    from flashdmd_ray.roles.networks import load_student

    source = find_student(run, config)
    judging = config.model_copy(update={"rewards": tuple(pixel_rewards(config))})
    try_loading(judging, judging.rewards)

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
