"""Copies a run folder to a tracking library while it grows: `python -m flashdmd_ray.run.mirror RUN_FOLDER mlflow|tensorboard|wandb ...`.

The library works in this process, not in the training's: importing MLflow and creating its sqlite schema take seconds, a server may be
slow, away or silent, and none of that may delay or end a training. The run folder is the truth. Metrics are read from its
`metrics.jsonl`, so whatever a server missed is sent later, and a (key, step) that is there is not sent twice, also when a run resumes.

MLflow's tracking URI, which may hold a password, comes in the environment variable URI_VARIABLE. Standard input tells the rest, one JSON
object per line: {"image": [key, path, step]}, {"tag": [key, text]}, {"file": path}, {"model": folder}, {"finish": "FINISHED"}. Its end
without "finish" means that the training died: the run is closed as KILLED. Standard output has one line per sign of life: "ok" after a
successful transfer, else a text for the user, which begins with LEFT_OUT when it is about one thing that was refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from flashdmd_ray.config import hide_passwords
from flashdmd_ray.run.destinations import LEFT_OUT, TITLES, URI_VARIABLE, Destination, LeftOut, Unusable
from flashdmd_ray.run.interruption import INSISTENT, NOTICES
from flashdmd_ray.run.messages import one_line, typed_line
from flashdmd_ray.run.metrics_log import MetricsTail
from flashdmd_ray.run.mlflow_run import REFUSALS
from flashdmd_ray.run.output import outlive_readers, private_output

MOST_LEFT_OUT = 10
"""Things left out that the user is told of, one by one; the process's log names all."""
PERIOD_S = 2.0
"""Between two transfers of metrics."""
LONGEST_PAUSE_S = 60.0
"""Between two attempts while the server does not answer; the first pause is PERIOD_S, each one doubles."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "WANDB_ERROR_REPORTING": "false",
}
"""Settings of the libraries that the user's environment does not state otherwise."""


class Mirror:
    """Does what is due, in order. What fails stays due; what the destination refuses for good is left out."""

    def __init__(self, connect: Callable[[], Destination], folder: Path) -> None:
        self._connect = connect
        self._run: Destination | None = None
        self._tail = MetricsTail(folder / "metrics.jsonl")
        self._records: list[tuple[int, dict[str, Any]]] = []
        self._orders: list[dict[str, Any]] = []

    def transfer(self, orders: list[dict[str, Any]]) -> None:
        """Send everything that is due. Raises whatever the library raises for a reason that may pass."""
        self._orders += orders
        self._records += self._tail.new_records()
        if self._run is None:
            if not (self._records or self._orders):
                return  # importing MLflow takes seconds of a core, which a starting run has better use for
            self._run = self._connect()
            say("ok")
        if self._records:
            self._run.log_metrics(self._records)
            self._records = []
        while self._orders:
            try:
                self._obey(self._run, self._orders[0])
            except Exception as error:
                if not isinstance(error, LeftOut) and not self._run.refuses(error):
                    raise
                leave_out(f"{json.dumps(self._orders[0])} ({one_line(error)})")
            self._orders.pop(0)
            say("ok")

    def _obey(self, run: Destination, order: dict[str, Any]) -> None:
        match order:
            case {"image": [key, path, step]}:
                run.log_image(key, path, step)
            case {"tag": [key, text]}:
                run.tag(key, text)
            case {"file": path}:
                run.log_file(path)
            case {"model": folder}:
                run.log_model(folder)
            case {"finish": status}:
                run.finish(status)
            case _:
                raise AssertionError(f"unknown order {order}")


def follow(mirror: Mirror, inbox: queue.SimpleQueue[dict[str, Any]], title: str) -> bool:
    """Transfer until "finish" was obeyed (True), or failed after it was ordered (False). Between failures the pauses grow."""
    pause, warned, finishing = PERIOD_S, False, False
    while True:
        orders = []
        deadline = time.monotonic() + pause
        while not finishing and (left := deadline - time.monotonic()) > 0:
            try:
                orders.append(inbox.get(timeout=left))
            except queue.Empty:
                break
            finishing = "finish" in orders[-1]
        try:
            mirror.transfer(orders)
        except Exception as error:
            logging.exception("a transfer failed")
            if finishing:
                say(f"{title} did not take everything ({reason_of(error, title)}); the run folder has it all")
                return False
            if not warned:
                say(f"{reason_of(error, title)}; the run goes on, the transfer is tried again")
            pause, warned = min(2 * pause, LONGEST_PAUSE_S), True
        else:
            pause, warned = PERIOD_S, False
            if finishing:
                return True
            say("ok")


def reason_of(error: Exception, title: str) -> str:
    """Say why a transfer failed, with the remedy where it is known."""
    if isinstance(error, Unusable):
        return one_line(error, 600)
    verb = "refuses the run" if getattr(error, "error_code", None) in REFUSALS else "cannot be reached"
    return f"{title} {verb} ({typed_line(error)})"


_left_out: list[str] = []
_channel: list[TextIO] = []
"""The stream that the training process reads; standard output until `main` has opened it."""


def leave_out(text: str) -> None:
    """Tell the user of one thing that is refused, the first MOST_LEFT_OUT times."""
    logging.warning("left out: %s", text)
    _left_out.append(text)
    if len(_left_out) <= MOST_LEFT_OUT:
        say(f"{LEFT_OUT}{text}; the run folder has it")
    elif len(_left_out) == MOST_LEFT_OUT + 1:
        say(f"{LEFT_OUT}more than these; see its log")


def say(text: str) -> None:
    """Send one line to the training process, which may be gone."""
    print(hide_passwords(text, os.environ.get(URI_VARIABLE, "")), flush=True, file=_channel[0] if _channel else None)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hide_passwords(super().format(record), os.environ.get(URI_VARIABLE, ""))


def read_orders(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Put each line of standard input into the inbox; its end means that the training died."""
    for line in sys.stdin:
        inbox.put(json.loads(line))
    inbox.put({"finish": "KILLED"})


def main() -> int:
    parser = argparse.ArgumentParser(description="Mirror a run folder to a tracking library.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("destination", choices=TITLES)
    parser.add_argument("group", nargs="?", default="", help="MLflow's experiment, W&B's project")
    arguments = parser.parse_args()
    for number in (*INSISTENT, *NOTICES):  # meant for the training, which then says "finish" or closes the input
        signal.signal(number, signal.SIG_IGN)
    _channel.append(private_output())  # MLflow prints the address of a run
    outlive_readers()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.nice(5)
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=read_orders, args=(inbox,), daemon=True).start()
    folder = arguments.folder.resolve()
    mirror = Mirror(lambda: connect(arguments.destination, folder, arguments.group), folder)
    return 0 if follow(mirror, inbox, TITLES[arguments.destination]) else 1


def connect(destination: str, folder: Path, group: str) -> Destination:
    """Open the run at its destination; imports that library alone."""
    if destination == "mlflow":
        from flashdmd_ray.run.mlflow_run import MlflowRun

        uri = os.environ[URI_VARIABLE]
        return MlflowRun(folder, uri, hide_passwords(uri, uri), group, leave_out)
    if destination == "tensorboard":
        from flashdmd_ray.run.tensorboard_run import TensorBoardRun

        return TensorBoardRun(folder)
    from flashdmd_ray.run.wandb_run import WandbRun

    return WandbRun(folder, group)


if __name__ == "__main__":
    sys.exit(main())
