"""The last lines of a worker's log, from whichever machine it was on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flashdmd_ray.run.messages import one_line

READ_S = 3.0
"""For a machine to answer with the lines of a worker that it has lost."""
LINES, BYTES, LONGEST_LINE = 3, 4096, 160
MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Starts of lines by which Ray tells the writers of a log apart."""


def own_log() -> tuple[str, str]:
    """Node and file that this process writes its standard error to; called in the worker."""
    path = ""
    with suppress(OSError):
        path = os.readlink("/proc/self/fd/2")
    return ray.get_runtime_context().get_node_id(), path


def last_lines(node: str, path: str) -> str:
    """The end of that log in one line; "" where it cannot be read. Does not raise, and waits READ_S at most."""
    if not path:  # it ended before it could say where
        return ""
    try:
        if node == ray.get_runtime_context().get_node_id():
            return tail(path)
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        remote = ray.remote(tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        return str(ray.get(remote.remote(path), timeout=READ_S))
    except Exception:  # the machine may be gone, or Ray itself
        return ""


def tail(path: str) -> str:
    """The last lines of a file that say something, joined by a bar; "" where there is none."""
    try:
        data = Path(path).read_bytes()[-BYTES:]
    except OSError:
        return ""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip() and not line.startswith(MARKS)]
    return " | ".join(one_line(line, LONGEST_LINE) for line in lines[-LINES:])
