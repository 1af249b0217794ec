"""Run the checks of a test module in real processes: importing DeepSpeed takes seconds, so one launch serves all checks of a module.

A check is a function (kind, directory) that every rank runs, with asserts. pytest shows each (check, kind) as a test of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from flashdmd_ray.engine import free_port, init_process_group

DEADLINE_S = 1500
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
        arguments = [module, str(ranks), str(free_port()), str(directory)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.ranks", *arguments, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=Path(__file__).parents[2],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(ranks)
        ]
        try:
            self.printed[ranks] = "".join(process.communicate(timeout=DEADLINE_S)[0] for process in processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank in range(ranks):
            file = directory / f"results-{ranks}-{rank}.json"
            assert file.exists(), f"rank {rank} of {ranks} ended without results:\n{self.printed[ranks]}"
            for name, outcome in json.loads(file.read_text()).items():
                self.outcomes.setdefault((ranks, name), []).append(outcome)


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
    run_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still run on a busy machine, and C++ complains when an exit meets them
