"""The command line of joint training. What a user can get wrong is said in one line before torch is imported.

Exit codes: 0 done, 1 the run failed, 2 the configuration or a file it names is wrong, 3 the hack monitor stopped it, 130 and 143 after
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from flashdmd_ray.config import Config, dump_config, load_config
from flashdmd_ray.plan import check, describe, preview
from flashdmd_ray.run_directory import RunDirectory

FAILED, REFUSED = 1, 2
LONGEST_MESSAGE = 600


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
        from flashdmd_ray.job import run_job

        return run_job(config)

    return exit_code(train, run)


def exit_code(work: Callable[[], int], run: RunDirectory) -> int:
    """Do work in that run folder. Whatever ends it early becomes one line and an exit code; the traceback goes to the folder."""
    prepare_process()
    is_new = not run.exists
    try:
        return work()
    except ValueError as error:
        note_traceback(run)
        if is_new:
            run.discard_unused()
        return refuse(error)
    except KeyboardInterrupt:
        say("stopped at once; the same command resumes from the last checkpoint")
        return 128 + signal.SIGINT
    except Exception as error:
        where = f" (traceback: {run.errors})" if note_traceback(run) else ""
        say(f"the run failed: {brief(error)}{where}; the same command resumes from the last checkpoint")
        return FAILED


def prepare_process() -> None:
    """Settings that libraries read when they are imported, quiet logs, and an orderly end on SIGTERM while models still load."""
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("DIFFUSERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)  # library warnings are for developers: kept out of the progress display
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def refuse(error: ValueError) -> int:
    """One line for each problem."""
    for line in str(error).splitlines() or [type(error).__name__]:
        say(line)
    return REFUSED


def brief(error: Exception) -> str:
    """The error in one line; errors that were not written for a reader carry their type."""
    text = " ".join(str(error).split())
    if not isinstance(error, RuntimeError | ArithmeticError | OSError):
        text = f"{type(error).__name__}: {text}"
    text = text or type(error).__name__
    return text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + " ..."


def note_traceback(run: RunDirectory) -> bool:
    """Append the traceback being handled to the run's error.log, if the run has a folder; whether it was written."""
    if not run.exists:
        return False
    try:
        with run.errors.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    print(f"error: {text}" if not text.startswith("stopped") else text, file=sys.stderr, flush=True)
