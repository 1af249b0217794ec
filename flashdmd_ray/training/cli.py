"""The command line of joint training. What a user can get wrong is said in one line before torch is imported.

Exit codes: 0 done, 1 the run failed, 2 the configuration or a file it names is wrong, 3 the hack monitor stopped it, 130 and 143 after
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashdmd_ray.config import Config, dump_config, load_config
from flashdmd_ray.plan import check, describe, preview
from flashdmd_ray.run.command_line import exit_code, refuse
from flashdmd_ray.run.folder import RunDirectory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(arguments)
    try:
        config = load_config(options.config, options.set)
        run, parts = preview(config) if options.dry_run else check(config)
    except ValueError as error:
        return refuse(error)
    print(dump_config(config), flush=True)
    if options.dry_run:
        print(describe(config, run, parts))
        return 0
    return execute(config, run)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="joint_train.py",
        description="Distil a diffusion or flow model into a few-step generator and refine it with preference RL beside it.",
        epilog="The same command again resumes the run where it stopped. Every key is explained in flashdmd_ray/config/.",
    )
    parser.add_argument(
        "config", metavar="CONFIG.yaml", nargs="?", type=Path, help="a configuration file; default: the shipped demo"
    )
    parser.add_argument(
        "--set",
        metavar="key=value",
        nargs="+",
        action="extend",
        default=[],
        help="set a key, e.g. steps=400 run.name=long",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print roles, parameters, placement, memory and schedule, then stop"
    )
    return parser.parse_args(arguments)


def execute(config: Config, run: RunDirectory) -> int:
    def train() -> int:
        print(f"{run.path}: {'opening' if run.exists else 'new run'}, loading libraries and models", flush=True)
        from flashdmd_ray.training.job import run_job

        return run_job(config)

    return exit_code(train, run)
