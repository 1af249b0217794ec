"""Exit codes and one-line errors of every command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from flashdmd_ray.run.folder import RunDirectory

FAILED, REFUSED = 1, 2

LONGEST_MESSAGE = 600


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
