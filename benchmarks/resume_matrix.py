"""Compare resumed runs with runs that never stopped, for every runtime, kind of training, ZeRO stage and change of ranks.

    python benchmarks/resume_matrix.py [--runtimes local ray] [--modes full lora] [--stages 1 2 3] [--quick] [--json FILE]

A cell makes STEPS steps on some ranks, with a checkpoint after SAVED of them, takes that checkpoint up on as many or other ranks and makes
the rest. Its figures compare the two last checkpoints, all roles, tensor by tensor: with equal ranks every bit must agree, otherwise the
root mean square difference must be at most 1e-5. `moved` is how far the rest of the steps moved the generator's weights (root mean square):
a resume that made no step would be that far off.

local: the driver and all roles in each rank's own process, see `in_ranks`. ray: actors, as in a job. --quick: one change of ranks for each
stage of whole networks and for adapters at stage 3, locally. The networks are random and tiny, unless --teacher names others.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from flashdmd_ray.batch import Metrics
from flashdmd_ray.checkpoint import load_tensors
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.engine import free_port, init_process_group
from flashdmd_ray.engine.deepspeed_engine import import_deepspeed
from flashdmd_ray.runtime.border import RoleHere
from flashdmd_ray.runtime.build import build_runtime, worker_groups
from flashdmd_ray.runtime.local import LocalRuntime
from flashdmd_ray.runtime.placement import create_roles, rewards_of
from flashdmd_ray.runtime.protocol import Runtime
from flashdmd_ray.runtime.shards import join_results, split_arguments

STEPS, SAVED, TOLERANCE, DEADLINE_S = 3, 2, 1e-5, 900.0
CHANGES = ((1, 2), (2, 1), (2, 2))
"""(ranks that save, ranks that resume)."""


@dataclass(frozen=True)
class Kind:
    """Settings shared by the runs of several cells."""

    runtime: str
    mode: str
    stage: int

    def config(self, teacher: Path, ranks: int) -> Config:
        return parse_config(
            {
                "steps": STEPS,
                "batch": 4,
                "runtime": self.runtime,
                "model": {"teacher": str(teacher)},
                "engine": {"kind": "deepspeed", "zero_stage": self.stage},
                "lora": {"networks": ["generator", "score"] if self.mode == "lora" else [], "rank": 4},
                "generator": {"lr": 1e-4, "warmup": 0},
                "score": {"lr": 1e-4, "warmup": 0},
                "preference": {"updates": 1, "batch": 2, "start_step": 1, "threshold": 0.0},
                "rewards": [{"kind": "pickscore"}],
                "evaluation": {"ema": 0.5},
                "placement": {"learner": {"workers": ranks if self.runtime == "ray" else 1}},
                "deadlines": {"start_s": DEADLINE_S},
            }
        )


@dataclass(frozen=True)
class Row:
    """The outcome of a cell."""

    runtime: str
    mode: str
    stage: int
    ranks: str
    tensors: int
    different: int
    worst: float
    moved: float

    @property
    def good(self) -> bool:
        same = self.different == 0 if self.ranks[0] == self.ranks[-1] else self.worst <= TOLERANCE
        return same and self.moved > 2 * TOLERANCE


class Leg:
    """Some steps of a run, with checkpoints after some of them."""

    preference_rate = 1.0

    def __init__(self, runtime: Runtime, first: int, folders: Mapping[int, Path]) -> None:
        self._runtime, self._first, self._folders = runtime, first, folders

    def steps(self) -> Iterable[int]:
        return range(self._first, STEPS)

    def finish(self, step: int, metrics: Metrics) -> None:
        folder = self._folders.get(step + 1)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for role in roles(self._runtime):
                role.save(folder)
            (folder / "complete").touch()


def roles(runtime: Runtime) -> tuple[Any, ...]:
    return runtime.generator, runtime.score, runtime.discriminator


def straight(runtime: Runtime, config: Config, folder: Path) -> None:
    """The run that never stops."""
    leg = Leg(runtime, 0, {SAVED: folder / "saved", STEPS: folder / "finished"})
    train(config, runtime, build_images(config.data, config.seed), leg)


def resume(runtime: Runtime, config: Config, saved: Path, finished: Path) -> None:
    """Continue a run from its checkpoint to its end."""
    wait_for(saved)
    for role in roles(runtime):
        role.load(saved)
    train(config, runtime, build_images(config.data, config.seed), Leg(runtime, SAVED, {STEPS: finished}))


def wait_for(folder: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not (folder / "complete").exists():
        assert time.monotonic() < end, f"no checkpoint in {folder} after {DEADLINE_S:g} s"
        time.sleep(0.05)


def on_ray(kind: Kind, changes: Iterable[tuple[int, int]], teacher: Path, root: Path) -> None:
    with ExitStack() as stack:
        configs = {ranks: kind.config(teacher, ranks) for ranks in (1, 2)}
        runtimes = {ranks: stack.enter_context(closing(build_runtime(config))) for ranks, config in configs.items()}
        for ranks in dict.fromkeys(saving for saving, _ in changes):
            straight(runtimes[ranks], configs[ranks], root / str(ranks))
        for saving, ranks in changes:
            resume(runtimes[ranks], configs[ranks], root / str(saving) / "saved", root / f"{saving}->{ranks}")


class InRanks:
    """Role of which this process holds one rank's part. Every rank makes the same calls and gets the driver's answers."""

    def __init__(self, role: Any) -> None:
        self.role = role

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        here = tuple(neighbour(value) for value in args)
        shards, sizes = split_arguments(here, kwargs, dist.get_world_size())
        mine, named = shards[dist.get_rank()]
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, getattr(self.role, method)(*mine, **named))
        return join_results(results, sizes)


def neighbour(value: Any) -> Any:
    """The role itself behind the runtime's handle and `InRanks`; other arguments as they are."""
    value = value._role if isinstance(value, RoleHere) else value
    return value.role if isinstance(value, InRanks) else value


def in_ranks(config: Config, rank: int, ranks: int) -> LocalRuntime:
    """The runtime of one rank of processes that hold all roles."""
    (group,) = worker_groups(config)
    roles = {name: InRanks(role) for name, role in create_roles(group, rank, ranks).items()}
    return LocalRuntime(roles, rewards_of(roles))


Cells = Mapping[Kind, tuple[tuple[int, int], ...]]


def live_as_rank(cells: Cells, rank: int, ranks: int, port: int, teacher: Path, root: Path) -> None:
    """Play one rank's part in all local cells, in a forked process."""
    torch.set_num_threads(1)
    init_process_group(rank, ranks, port=port, timeout_s=DEADLINE_S)
    for kind, changes in cells.items():
        if not any(ranks in change for change in changes):
            continue
        config, folder = kind.config(teacher, ranks), root / name_of(kind)
        runtime = in_ranks(config, rank, ranks)
        if any(ranks == saving for saving, _ in changes):
            straight(runtime, config, folder / str(ranks))
        for saving, resuming in changes:
            if resuming == ranks:
                resume(runtime, config, folder / str(saving) / "saved", folder / f"{saving}->{ranks}")


def run_local(cells: Cells, teacher: Path, root: Path) -> None:
    """One process for the cells' single ranks, two for their pairs of ranks, at the same time: they read each other's checkpoints."""
    import_deepspeed(torch.device("cpu"))
    import_module(
        "deepspeed.runtime.zero.muon.muon_optimizer"
    )  # by the first engine otherwise: seconds for each process
    gc.freeze()  # else the processes' collections walk, and so copy, all that was imported
    context = multiprocessing.get_context("fork")
    arguments = [(rank, ranks, port) for ranks, port in ((1, 0), (2, free_port())) for rank in range(ranks)]
    processes = [context.Process(target=live_as_rank, args=(cells, *a, teacher, root)) for a in arguments]
    for process in processes:
        process.start()
    gc.unfreeze()
    try:
        while any(process.is_alive() for process in processes) and all(p.exitcode in (None, 0) for p in processes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    if any(process.exitcode for process in processes):
        sys.exit(f"ranks ended with {[process.exitcode for process in processes]}")


def name_of(kind: Kind) -> str:
    return f"{kind.runtime}-{kind.mode}-{kind.stage}"


def judge(kind: Kind, change: tuple[int, int], root: Path) -> Row:
    """Compare the two ends of a cell."""
    saved, expected = (tensors(root / str(change[0]) / end) for end in ("saved", "finished"))
    ranks = f"{change[0]}->{change[1]}"
    found = tensors(root / ranks)
    assert found.keys() == expected.keys(), ranks
    apart = [rms(found[name], value) for name, value in expected.items()]
    weights = [name for name in expected if name.startswith("generator.safetensors:weights/")]
    moved = torch.cat([(expected[name] - saved[name]).flatten() for name in weights])
    different = sum(not torch.equal(found[name], value) for name, value in expected.items())
    worst = max(apart)
    return Row(kind.runtime, kind.mode, kind.stage, ranks, len(expected), different, worst, rms(moved, torch.zeros(())))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}:{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_tensors(file).items()
    }


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).square().mean().sqrt().item()


def chosen_cells(options: argparse.Namespace) -> Cells:
    kinds = [Kind(r, m, s) for r in options.runtimes for m in options.modes for s in options.stages]
    if not options.quick:
        return dict.fromkeys(kinds, CHANGES)
    kinds = [kind for kind in kinds if kind.runtime == "local" and (kind.mode == "full" or kind.stage == 3)]
    return {kind: (CHANGES[index % 3],) for index, kind in enumerate(kinds)}


def tiny_teacher(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.tiny import save_sdxl

    return save_sdxl(folder / "teacher")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", choices=["local", "ray"], default=["local", "ray"])
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--stages", nargs="+", type=int, choices=[1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cells, rows = chosen_cells(options), []
    with TemporaryDirectory() as name:
        root = Path(name)
        teacher = options.teacher or tiny_teacher(root)
        run_local({kind: changes for kind, changes in cells.items() if kind.runtime == "local"}, teacher, root)
        for kind, changes in cells.items():
            if kind.runtime == "ray":
                on_ray(kind, changes, teacher, root / name_of(kind))
            for change in changes:
                rows.append(judge(kind, change, root / name_of(kind)))
                print(describe(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"good": row.good} for row in rows], indent=1) + "\n")
    return 0 if all(row.good for row in rows) else 1


def describe(row: Row) -> str:
    verdict = "good" if row.good else "BAD"
    return (
        f"{row.runtime:5s} {row.mode:4s} ZeRO {row.stage}  ranks {row.ranks}  {verdict:4s}  bits differ in {row.different} of "
        f"{row.tensors} tensors, worst {row.worst:.1e}, moved {row.moved:.1e}"
    )


if __name__ == "__main__":
    sys.exit(main())
