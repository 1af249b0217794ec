"""Loading under ZeRO stage 3: four ranks of a node never hold more than one full copy of the weights, beside what they keep."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashdmd_ray.checkpoint import load_tensors, save_tensors
from flashdmd_ray.engine import Engine, in_turn, skeleton
from tests.engine.common import engine
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters

RANKS = 4
WIDTH, DEPTH = 1024, 24
FULL_MIB = DEPTH * (WIDTH * WIDTH + WIDTH) * 4 / 2**20
"""96 MiB in float32."""


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


class Peak:
    """Memory of this process alone (shared pages of mapped files counted by share) while a block runs, sampled every 5 ms, in MiB."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.most = memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        gc.collect()
        self.after = memory()
        self.most = max(self.most, self.after)

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, memory())
            time.sleep(0.005)


def memory() -> float:
    return psutil.Process().memory_full_info().pss / 2**20


def measure(directory: Path, load: Callable[[], Engine]) -> tuple[float, float]:
    """(most, kept) of all ranks together while `load` makes an engine, in full copies of the weights."""
    dist.barrier()
    with Peak() as peak:
        trained = load()
        dist.barrier()
    assert len(list(trained.module.parameters())) == 2 * DEPTH
    mine = directory / f"{dist.get_rank()}.json"
    mine.write_text(json.dumps([peak.most - peak.before, peak.after - peak.before]))
    dist.barrier()
    both = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(RANKS)]
    dist.barrier()
    return sum(most for most, _ in both) / FULL_MIB, sum(kept for _, kept in both) / FULL_MIB


def check_no_rank_holds_a_copy_of_its_own(kind: str, directory: Path) -> None:
    """The ranks' peaks, added up although they need not coincide, against ranks that each read the file and build the network."""
    file = directory / "weights.safetensors"
    engine(kind, module=nn.Linear(2, 2))  # what DeepSpeed allocates once
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        save_tensors(file, network().state_dict())
    dist.barrier()

    def from_rank_0() -> Engine:
        with torch.device("meta"):
            empty = network()
        return engine(kind, module=empty, source=load_tensors(file) if dist.get_rank() == 0 else None)

    def each_by_itself() -> Engine:
        module = network()
        module.load_state_dict(load_tensors(file))
        return engine(kind, module=module)

    most, kept = measure(directory, from_rank_0)
    naive, _ = measure(directory, each_by_itself)
    if dist.get_rank() == 0:
        (directory / "measured.json").write_text(json.dumps({"most": most, "kept": kept, "each by itself": naive}))
    # Kept for good: the slices of weights, masters and gradient, three copies over all ranks together.
    assert kept < 3.6, kept
    assert most - kept < 1.0 + 0.5, (most, kept)  # one copy, and a parameter or two (4 %) in each rank
    assert naive - most > 1.5, (naive, most)


def check_ranks_take_turns(kind: str, directory: Path) -> None:
    with in_turn():
        started = time.monotonic()  # one clock for all processes of a machine
        time.sleep(0.05)
        mine = [started, time.monotonic()]
    spans: list[list[float]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(spans, mine)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


CHECKS: Checks = {RANKS: [(check_ranks_take_turns, ["any"]), (check_no_rank_holds_a_copy_of_its_own, ["zero3"])]}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(f"tests.engine.{Path(__file__).stem}", CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_memory_of_four_ranks(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)


def test_a_skeleton_has_the_structure_and_no_weights() -> None:
    whole = nn.Sequential(nn.Linear(3, 5, dtype=torch.bfloat16), nn.BatchNorm1d(5)).requires_grad_(False)
    empty = skeleton(whole)
    assert all(p.is_meta and p.dtype == torch.float32 and not p.requires_grad for p in empty.parameters())
    assert torch.equal(empty[1].running_var, whole[1].running_var)
    assert empty[1].running_var is not whole[1].running_var
    assert all(not p.is_meta for p in whole.parameters())
