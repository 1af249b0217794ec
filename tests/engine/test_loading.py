"""Loading under ZeRO stage 3 with four ranks on one machine: together they hold one copy of the weights, and one parameter more each."""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashdmd_ray.checkpoint import load_tensors, save_tensors
from flashdmd_ray.config import parse_config
from flashdmd_ray.engine import Engine, base, in_turn, skeleton
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from tests.engine.common import KINDS, assert_same, engine
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters
from tests.tiny import save_sdxl

RANKS = 4
WIDTH, DEPTH = 1024, 24
FULL_MIB = DEPTH * (WIDTH * WIDTH + WIDTH) * 4 / 2**20
"""96 MiB in float32."""
SLACK_MIB = 6
"""What else a process may take meanwhile: gloo's buffers, Python's objects."""


def network() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))


class Peak:
    """The most memory that this process holds while a block runs, over what it held before, in MiB. The kernel keeps the mark, so nothing
    is missed. Pages of mapped files count too."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        self._before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is held now
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = status("VmHWM") - self._before


def status(field: str) -> float:
    """MiB, of this process."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024


def of_all_ranks(peak: Peak) -> list[float]:
    taken = [0.0] * RANKS
    dist.all_gather_object(taken, peak.mib)
    return taken


def check_a_node_holds_one_copy_while_it_loads(kind: str, directory: Path) -> None:
    """While the weights arrive a rank holds its slice and one whole parameter. Then DeepSpeed makes masters and buffers of that slice: less
    than the rank holds in training. Ranks that read for themselves hold the network and the pages of the file."""
    file = directory / "weights.safetensors"
    one_update(engine(kind, module=nn.Linear(2, 2)))  # what DeepSpeed allocates once
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        save_tensors(file, network().state_dict())
    dist.barrier()

    with arrivals() as arriving, Peak() as whole:
        with torch.device("meta"):
            empty = network()
        trained = engine(kind, module=empty, source=load_tensors(file) if dist.get_rank() == 0 else None)
    with Peak() as by_itself:
        module = network()
        module.load_state_dict(load_tensors(file))
    held = FULL_MIB / RANKS + WIDTH * WIDTH * 4 / 2**20
    mapped = FULL_MIB  # the file, of which rank 0 reads every page
    for rank, taken in enumerate(of_all_ranks(arriving[0])):
        assert held <= taken <= held + SLACK_MIB + (mapped if rank == 0 else 0), (rank, taken)
    assert min(of_all_ranks(by_itself)) > 1.9 * FULL_MIB

    with Peak() as training:
        one_update(trained)
    ranks = zip(of_all_ranks(whole), of_all_ranks(training), strict=True)
    assert all(loading - (mapped if rank == 0 else 0) < update for rank, (loading, update) in enumerate(ranks))


def check_roles_start_from_the_teacher(kind: str, directory: Path) -> None:
    """Its weights in every rank's slices, although no rank builds a network of its own."""
    if dist.get_rank() == 0:
        save_sdxl(directory / "teacher")
    dist.barrier()
    tree = {"model": {"teacher": str(directory / "teacher")}, "engine": KINDS[kind]}
    config = parse_config(tree)
    family = load_family(config.model)
    family.denoiser = None  # type: ignore[assignment, method-assign]
    expected = family.teacher.state_dict() if dist.get_rank() == 0 else {}
    for role in (Generator.from_config(config), ScoreEstimator.from_config(config)):
        assert role.engine.module.training
        assert_same(role.engine.weights(), expected)


def one_update(trained: Engine) -> None:
    width = next(m for m in trained.module.modules() if isinstance(m, nn.Linear)).in_features
    trained.backward(trained(torch.ones(2, width)).square().mean())
    trained.update()


@contextmanager
def arrivals() -> Iterator[list[Peak]]:
    """The peak of the part of an engine's start in which its weights arrive."""
    receive, found = base.receive, []

    def measured(*arguments: Any) -> None:
        with Peak() as peak:
            receive(*arguments)
        found.append(peak)

    base.receive = measured
    try:
        yield found
    finally:
        base.receive = receive


def check_ranks_take_turns(kind: str, directory: Path) -> None:
    with in_turn():
        started = time.monotonic()  # one clock for all processes of a machine
        time.sleep(0.05)
        mine = [started, time.monotonic()]
    spans: list[list[float]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(spans, mine)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans)), spans


CHECKS: Checks = {
    RANKS: [
        (check_ranks_take_turns, ["any"]),
        (check_a_node_holds_one_copy_while_it_loads, ["zero3"]),
        (check_roles_start_from_the_teacher, ["zero3"]),
    ]
}


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
