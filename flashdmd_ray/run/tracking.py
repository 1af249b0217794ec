"""Tracking of a run: `metrics.jsonl` at once, MLflow, TensorBoard and W&B in the background. Imports neither torch nor any of them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, Self

from flashdmd_ray.config import TrackingConfig, tracking_address
from flashdmd_ray.run.destinations import LEFT_OUT, TITLES, URI_VARIABLE
from flashdmd_ray.run.folder import RunDirectory
from flashdmd_ray.run.metrics_log import MetricsLog

log = logging.getLogger(__name__)

SILENCE_S = 120.0
"""At the end, how long to wait for the next sign of life of a mirror process before it is left behind."""
HURRY_S = 5.0
"""The same for someone who pressed Ctrl-C twice."""

Status = Literal["finished", "interrupted", "failed"]
END = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Tracker:
    """Metrics, grids and the exported model of one run.

    Metrics are on disk when `metrics` returns. MLflow, TensorBoard and W&B are fed by processes of their own (flashdmd_ray/run/mirror.py)
    that read the run folder; if one or its server fails, one warning is logged and the run goes on. Records of steps after `after_step` are
    dropped first: a resumed run computes them again.
    """

    def __init__(self, run: RunDirectory, config: TrackingConfig, after_step: int) -> None:
        self._run = run
        self._metrics = MetricsLog(run.metrics, after_step)
        self._mirrors = []
        if config.enabled:
            address = {URI_VARIABLE: tracking_uri(config, run)}
            self._mirrors.append(MirrorProcess(run.path, "mlflow", config.experiment, address))
        if config.tensorboard:
            self._mirrors.append(MirrorProcess(run.path, "tensorboard"))
        if config.wandb is not None:
            self._mirrors.append(MirrorProcess(run.path, "wandb", config.wandb))

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record numbers (Python, numpy or torch scalars) of one step."""
        self._metrics.write(step, metrics)

    def rewind(self, after_step: int) -> None:
        """Forget the steps after `after_step`: the job was built anew from a checkpoint and computes them again."""
        self._metrics.rewind(after_step)

    def image(self, key: str, path: Path, step: int) -> None:
        """Show an image file of the run folder under a key such as 'samples'."""
        self._order({"image": [key, self._relative(path), step]})

    def file(self, path: Path) -> None:
        """Keep a file of the run folder beside the metrics."""
        self._order({"file": self._relative(path)})

    def tag(self, key: str, text: str) -> None:
        """Set a text that describes the run as it is now."""
        self._order({"tag": [key, text]})

    def model(self, folder: Path) -> None:
        """Log an exported pipeline of the run folder as a model, with its README.md as the card, and register it."""
        self._order({"model": self._relative(folder)})

    def finish(self, status: Status, timeout_s: float | None = None) -> None:
        """Close the metrics and give the mirrors the rest; waits as long as they make progress. Further calls do nothing."""
        self._metrics.close()
        mirrors, self._mirrors = self._mirrors, []
        for mirror in mirrors:
            mirror.order({"finish": END[status]})
        for mirror in mirrors:
            mirror.wait(SILENCE_S if timeout_s is None else timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.finish("finished")
        elif issubclass(kind, Exception):
            self.finish("failed")
        else:
            self.finish("interrupted", HURRY_S)

    def _order(self, order: dict[str, Any]) -> None:
        for mirror in self._mirrors:
            mirror.order(order)

    def _relative(self, path: Path) -> str:
        return path.resolve().relative_to(self._run.path.resolve()).as_posix()


def tracking_uri(config: TrackingConfig, run: RunDirectory) -> str:
    """The address of MLflow, with its password if it has one. Raises ValueError when the variable that holds it is empty."""
    if config.uri_env is None:
        return config.uri or default_uri(run)
    uri = os.environ.get(config.uri_env)
    if not uri:
        raise ValueError(
            f"tracking.uri_env: the environment variable {config.uri_env} is not set; set it to MLflow's address, or use tracking.uri"
        )
    try:
        return tracking_address(uri)
    except ValueError as error:
        raise ValueError(f"tracking.uri_env: the address in {config.uri_env} {error}") from None


def default_uri(run: RunDirectory) -> str:
    """A sqlite database beside the run folders."""
    return f"sqlite:///{(run.path.parent / 'mlflow.db').resolve()}"


class MirrorProcess:
    """The other end of `python -m flashdmd_ray.run.mirror`. No method raises, and only `wait` waits."""

    def __init__(
        self, folder: Path, destination: str, group: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self._title = TITLES[destination]
        self._log = folder / f"{destination}.log"
        self._last_sign = time.monotonic()
        self._warned = False
        command = [sys.executable, "-m", "flashdmd_ray.run.mirror", str(folder), destination, *filter(None, [group])]
        self._errors: IO[bytes] = self._log.open("ab")
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,  # a closed terminal, Ctrl-C and batch systems signal the group of the training
        )
        self._listener = threading.Thread(target=self._listen, name=f"{destination}-listener", daemon=True)
        self._listener.start()

    def order(self, order: dict[str, Any]) -> None:
        """Queue an order. The other side always reads, so a few hundred short lines cannot fill the pipe."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            self._warn(f"the process for {self._title} ended early; the run folder has everything")

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the process, which was ordered to finish; it is killed after so long without a sign of life."""
        self._last_sign = time.monotonic()
        while self._process.poll() is None and time.monotonic() - self._last_sign < timeout_s:
            time.sleep(0.05)
        if self._process.poll() is None:
            self._process.kill()
            self._warn(
                f"{self._title} was silent for {timeout_s:g} s and is left behind; the run folder has everything"
            )
        self._process.wait()
        self._listener.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what the other side did not read any more
                pipe.close()  # type: ignore[union-attr]
        if self._process.returncode != 0:
            self._warn(f"the process for {self._title} failed; see {self._log}")
        self._errors.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._last_sign = time.monotonic()
            text = line.strip()
            if text.startswith(LEFT_OUT):
                log.warning("tracking: %s does not take %s", self._title, text.removeprefix(LEFT_OUT))
            elif text != "ok":
                self._warn(text)

    def _warn(self, text: str) -> None:
        if not self._warned:
            log.warning("tracking: %s", text)
        self._warned = True
