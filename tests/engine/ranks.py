"""Run the checks of a test module in real processes.

Importing torch and DeepSpeed takes seconds, so one process of the session does it, and forks the ranks of every launch; one launch serves
all checks of a module that need as many ranks. A check is a function (kind, directory) that every rank runs, with asserts. pytest shows
each (check, kind) as a test of its own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from threading import Timer
from typing import NoReturn

import torch

from flashdmd_ray.engine import free_port, init_process_group

DEADLINE_S = 1500
LATER = ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What the first optimizer and the first DeepSpeed engine of a process import: more seconds."""
Check = Callable[[str, Path], None]
Checks = dict[int, list[tuple[Check, Iterable[str]]]]
"""Number of ranks -> checks in their order, each with the kinds of engine it is for."""


def parameters(checks: Checks) -> list[tuple[int, str]]:
    """What a test module is parametrised with: (ranks, "check[kind]")."""
    return [
        (ranks, f"{check.__name__}[{kind}]") for ranks, of in checks.items() for check, kinds in of for kind in kinds
    ]


class Launches:
    """The outcomes of a module's checks, one launch for each number of ranks, in the order of the numbers given."""

    def __init__(self, module: str, checks: Checks, directory: Path) -> None:
        self.printed: dict[int, str] = {}
        self.outcomes: dict[tuple[int, str], list[str]] = {}
        for ranks in checks:
            self._launch(module, ranks, directory)

    def expect_success(self, ranks: int, name: str) -> None:
        outcomes = self.outcomes.get((ranks, name), ["did not run: an earlier check failed"])
        assert outcomes == [""] * ranks, "\n".join(outcomes) + self.printed[ranks]

    def _launch(self, module: str, ranks: int, directory: Path) -> None:
        forking().launch(module, ranks, directory)
        printed = [directory / f"printed-{ranks}-{rank}.txt" for rank in range(ranks)]
        self.printed[ranks] = "".join(file.read_text() for file in printed)
        for rank in range(ranks):
            file = directory / f"results-{ranks}-{rank}.json"
            assert file.exists(), f"rank {rank} of {ranks} ended without results:\n{self.printed[ranks]}"
            for name, outcome in json.loads(file.read_text()).items():
                self.outcomes.setdefault((ranks, name), []).append(outcome)


class Forking:
    """This side of the process that forks ranks. It and its ranks end with this process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        atexit.register(self.end)

    def launch(self, module: str, ranks: int, directory: Path) -> None:
        """Returns when all ranks have ended, after DEADLINE_S at the latest."""
        order = {"module": module, "ranks": ranks, "port": free_port(), "directory": str(directory)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        deadline = Timer(DEADLINE_S, self.end)
        deadline.start()
        answer = self._process.stdout.readline()
        deadline.cancel()
        assert answer == "ended\n", (
            f"{order}: {answer + self._process.stdout.read()}"
        )  # DeepSpeed's import prints nothing

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@cache
def forking() -> Forking:
    return Forking()


def serve() -> None:
    """Import what ranks need, then fork the ranks of each order that comes in, and wait for them."""
    gc.disable()  # collections during imports take a fifth of their time
    from flashdmd_ray.engine.deepspeed_engine import import_deepspeed

    import_deepspeed(torch.device("cpu"))
    for name in LATER:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()  # else the ranks' collections walk, and so copy, all that was imported
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(order["ranks"]):
            child = os.fork()
            if child == 0:
                become_rank(order["module"], order["ranks"], order["port"], Path(order["directory"]), rank)
            children.append(child)
        wait_for(children)
        print("ended", flush=True)


def wait_for(children: list[int]) -> None:
    """Until all have ended. They are killed when the tests end before them: then there is something to read from stdin, its end."""
    running = set(children)
    while running:
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
        if running and select.select([sys.stdin], [], [], 0.02)[0]:
            for child in running:
                os.kill(child, signal.SIGKILL)


def become_rank(module: str, ranks: int, port: int, directory: Path, rank: int) -> NoReturn:
    """The life of a forked process."""
    with (directory / f"printed-{ranks}-{rank}.txt").open("wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    try:
        run_rank(module, ranks, port, directory, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # threads of gloo may still run on a busy machine, and C++ complains when an exit meets them


def run_rank(module: str, ranks: int, port: int, directory: Path, rank: int) -> None:
    """Run the checks in this process; write {"check[kind]": traceback or ""}."""
    torch.set_num_threads(1)
    if ranks > 1:  # a single DeepSpeed rank makes a group of its own
        init_process_group(rank, ranks, port=port, timeout_s=900)
    results: dict[str, str] = {}
    for check, kinds in importlib.import_module(module).CHECKS[ranks]:
        for kind in kinds:
            name = f"{check.__name__}[{kind}]"
            try:
                check(kind, directory)
                results[name] = ""
            except BaseException:
                results[name] = traceback.format_exc()
                if ranks > 1:  # the other rank may now wait for us in a collective: it fails when we are gone
                    break
        if any(results.values()) and ranks > 1:
            break
    (directory / f"results-{ranks}-{rank}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    serve()
