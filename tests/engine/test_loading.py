"""Loading under ZeRO stage 3 with four ranks on one machine: only the rank that reads the file sees all of the weights at once."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
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
        self.before = self.most = settled()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = settled()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, memory())
            time.sleep(0.005)


def memory() -> float:
    return psutil.Process().memory_full_info().pss / 2**20


def settled() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    return memory()


def passing(load: Callable[[], Engine]) -> float:
    """Memory that `load` took and gave back, in full copies of the weights: the median of the ranks that do not read from rank 0's file."""
    dist.barrier()
    with Peak() as peak:
        trained = load()
        dist.barrier()
    assert len(list(trained.module.parameters())) == 2 * DEPTH
    taken = [0.0] * RANKS
    dist.all_gather_object(taken, (peak.most - peak.after) / FULL_MIB)
    return statistics.median(taken[1:])


def check_no_rank_holds_a_copy_of_its_own(kind: str, directory: Path) -> None:
    """Against ranks that each read the file and build the network, which is one full copy for each. DeepSpeed itself copies slices while it
    starts: half a copy or more with four ranks."""
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

    ours, naive = passing(from_rank_0), passing(each_by_itself)
    # Sampled memory is noisy: 0.6 and 0.99 were read for ours, 1.2 and 1.09 for the other. No closer bound held in every run.
    assert ours < naive, (ours, naive)


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
