"""Options, exit codes and one-line errors that the commands share."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from flashdmd_ray.config import local_path
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.interruption import leave_on_signals
from flashdmd_ray.run.messages import one_line, typed_line
from flashdmd_ray.run.output import outlive_readers
from flashdmd_ray.run.storage import Location, RemotePath, children
from flashdmd_ray.run.variables import prepare_environment

FAILED, REFUSED = 1, 2

LONGEST_MESSAGE = 600


def training_parser(prog: str, description: str, keys: str, dry_run: str, default: str) -> argparse.ArgumentParser:
    """A parser with CONFIG, --set and --dry-run. keys: where every key is explained. dry_run: what --dry-run does."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"The same command again resumes the run where it stopped. {keys}",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        default=default,
        help="a YAML file, or the name of a preset (default: %(default)s)",
    )
    add_set(parser, "steps=400 run.name=long")
    parser.add_argument("--dry-run", action="store_true", help=f"{dry_run}, then stop")
    return parser


def add_set(parser: argparse.ArgumentParser, example: str) -> None:
    """Add the option `--set key=value ...`, which may be given several times."""
    parser.add_argument(
        "--set", metavar="key=value", nargs="+", action="extend", default=[], help=f"set a key, e.g. {example}"
    )


def path_argument(text: str) -> Path:
    """A folder or file on the command line, read as in settings: shells replace a ~ at the beginning of a word only."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_command(work: Callable[[], int]) -> int:
    """Do the work of a command that has no run folder of its own; an error becomes one line and an exit code."""
    prepare_process()
    try:
        return work()
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        say(f"failed: {brief(error)}")
        return FAILED


def run_training(work: Callable[[], int], run: RunDirectory, checkpoints: Location | None = None) -> int:
    """Do the work of a training command: errors as in `run_command`, and their traceback in the run folder.

    A new folder in which nothing was recorded is removed. checkpoints: where they lie; None: in the run folder.
    """
    is_new = not run.exists
    try:
        return work()
    except ValueError as error:
        note_traceback(run)
        if is_new:
            run.discard_unused()
        return refuse(error)
    except (KeyboardInterrupt, SystemExit) as stop:  # a signal while models load, a second one, or the end of its grace
        say(f"stopped at once; {next_start(run, checkpoints)}")
        return 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except Exception as error:
        where = f" (traceback: {run.errors})" if note_traceback(run) else ""
        say(f"the run failed: {brief(error)}{where}; {next_start(run, checkpoints)}")
        return FAILED


def next_start(run: RunDirectory, checkpoints: Location | None) -> str:
    """Say where the same command would start now."""
    if isinstance(checkpoints, RemotePath):  # perhaps it is what failed
        return "the same command resumes from the last checkpoint, if there is one"
    folders = children(checkpoints or run.path / "checkpoints")
    if any(folder.name.startswith("step-") for folder in folders):
        return "the same command resumes from the last checkpoint"
    return "no checkpoint was written yet: the same command starts from the beginning"


def prepare_process() -> None:
    """Prepare a command's process, before it prints anything.

    Settings that libraries read when they are imported, quiet logs, modules of the working directory, output that outlives its reader,
    and an orderly end on SIGTERM and its like while models still load.
    """
    prepare_environment(os.environ)
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
    leave_on_signals()
    outlive_readers()
    sys.excepthook = _without_interrupts
    try:
        here = os.getcwd()
    except OSError:
        say("the working directory is gone; change to one that is there")
        raise SystemExit(REFUSED) from None
    if here not in sys.path:
        sys.path.append(here)  # for classes of the user's own, as Ray does for its workers


def _without_interrupts(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C is no defect that would need a traceback; the exit code tells of it."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


def refuse(error: ValueError) -> int:
    """Print one line for each problem; returns the exit code."""
    for line in str(error).splitlines() or [type(error).__name__]:
        say(line)
    return REFUSED


def brief(error: Exception) -> str:
    """The error in one line; errors that were not written for a reader carry their type."""
    written = isinstance(error, RuntimeError | ArithmeticError | OSError)
    return one_line(error, LONGEST_MESSAGE) if written else typed_line(error, LONGEST_MESSAGE)


def note_traceback(run: RunDirectory) -> bool:
    """Append the traceback being handled to the run's error.log, if the run has a folder; returns whether it was written."""
    if not run.exists:
        return False
    try:
        with run.errors.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return False
    return True


def say(text: str) -> None:
    """Print an error, or that the command was stopped, to standard error."""
    print(f"error: {text}" if not text.startswith("stopped") else text, file=sys.stderr, flush=True)
