"""bfloat16 compute over float32 masters, on two ranks, against the same arithmetic written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashdmd_ray.engine import skeleton
from tests.engine.common import (
    BETAS,
    DECAY,
    LR,
    Network,
    assert_same,
    batch,
    engine,
    history,
    mean_loss,
    one_update,
    shard,
)
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters

KINDS = ("torch", "zero1", "zero2", "zero3", "torch-offload", "zero2-offload", "zero3-offload")
BF16 = {"precision": "bfloat16"}


class ByHand:
    """float32 masters; forward and backward in bfloat16, once for each rank's shard; gradients summed in float32."""

    def __init__(self, ranks: int = 2) -> None:
        self.masters, self.ranks = Network(0), ranks
        self.optimizer = torch.optim.AdamW(self.masters.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)

    def step(self, step: int) -> None:
        parameters = list(self.masters.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p)
        for part in batch(step).chunk(self.ranks):
            rounded = copy.deepcopy(self.masters).bfloat16()
            mean_loss(rounded, part).backward()
            for p, q in zip(parameters, rounded.parameters(), strict=True):
                p.grad += 0 if q.grad is None else q.grad.float() / self.ranks
        self.optimizer.step()


def assert_close_to(trained, module: nn.Module, tolerance: float) -> None:
    """Masters within rounding; the weights in use are those masters rounded."""
    weights, used = trained.weights(), dict(trained.copy().named_parameters())
    assert all(p.dtype == torch.bfloat16 for p in used.values())
    for name, expected in module.named_parameters():
        if weights:
            assert weights[name].dtype == torch.float32
            error = (weights[name] - expected).double().square().mean().sqrt()
            assert error <= tolerance, f"{name}: root mean square error {error}"
            assert torch.equal(used[name], weights[name].bfloat16()), f"{name} is not its master rounded"


def check_updates(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, **BF16), ByHand()
    assert_close_to(trained, Network(0), tolerance=0.0)  # masters are not rounded
    for step in range(4):
        one_update(trained, step)
        plain.step(step)
    # Stage 1 rounds the averaged gradient to bfloat16 once more (8 bits of mantissa), the others keep the float32 average.
    assert_close_to(trained, plain.masters, tolerance=LR * (2e-2 if kind == "zero1" else 2e-3))


def check_float32_would_differ(kind: str, directory: Path) -> None:
    """The tolerance above tells bfloat16 compute from float32 compute."""
    trained, plain = engine(kind), ByHand()
    for step in range(4):
        one_update(trained, step)
        plain.step(step)
    weights = trained.weights()
    worst = max(
        [(weights[name] - p).square().mean().sqrt().item() for name, p in plain.masters.named_parameters()]
        if weights
        else [1.0]
    )
    assert worst > LR * 2e-2


def check_small_steps_are_not_lost(kind: str, directory: Path) -> None:
    """At a rate where no bfloat16 weight of size 1 would ever move, the masters do."""
    trained = engine(kind, **BF16)
    start = trained.weights()
    for step in range(8):
        one_update(trained, step, lr=1e-5)
    now = trained.weights()
    if now:
        moved = (now["unused"] - start["unused"]).abs()
        torch.testing.assert_close(moved, torch.full((3,), 8 * 1e-5 * DECAY), rtol=0.05, atol=0)


def check_skeleton_and_average(kind: str, directory: Path) -> None:
    source = Network(0).state_dict() if dist.get_rank() == 0 else None
    score, generator = engine(kind, module=skeleton(Network(3)), source=source, **BF16), engine(kind, seed=1, **BF16)
    assert_close_to(score, Network(0), tolerance=0.0)
    for _ in range(5):
        score.ema_update_from(generator, 0.9)
    expected = Network(0)
    with torch.no_grad():
        for p, q in zip(expected.parameters(), Network(1).parameters(), strict=True):
            p.copy_(0.9**5 * p.double() + (1 - 0.9**5) * q.double())
    assert_close_to(score, expected, tolerance=1e-7)
    with torch.no_grad():
        assert torch.equal(score.module(batch(0)), score.copy()(batch(0)))


def check_micro_batches(kind: str, directory: Path) -> None:
    """The gradient of the sum, to bfloat16 rounding of each part."""
    whole, cut = engine(kind, **BF16), engine(kind, accumulation=4, **BF16)
    mine = shard(batch(0))
    for rows in cut.micro_batches(len(mine)):
        cut.backward(mean_loss(cut, mine[rows]))
    assert cut.update() == pytest.approx(one_update(whole, 0), rel=1e-2)


def check_not_finite_is_refused(kind: str, directory: Path) -> None:
    """DeepSpeed would skip the update without a word."""
    trained = engine(kind, **BF16)
    one_update(trained, 0)
    before = trained.state()
    trained.backward(mean_loss(trained, shard(batch(1))) * (float("nan") if dist.get_rank() else 1.0))
    with pytest.raises(FloatingPointError, match="the loss of distillation update 2 is not finite"):
        trained.update()
    assert_same(trained.state(), before)


def check_resume_is_bit_for_bit(kind: str, directory: Path) -> None:
    straight, resumed = engine(kind, clip=0.1, **BF16), engine(kind, seed=5, clip=0.1, **BF16)
    history(straight, range(2))
    holder = [straight.state()]
    dist.broadcast_object_list(holder, src=0)
    resumed.load_state(holder[0])
    for trained in (straight, resumed):
        history(trained, range(2, 4))
    assert_same(resumed.state(), straight.state())


CHECKS: Checks = {
    2: [
        (check_updates, KINDS),
        (check_float32_would_differ, ["torch"]),
        (check_small_steps_are_not_lost, KINDS),
        (check_skeleton_and_average, KINDS),
        (check_micro_batches, KINDS),
        (check_not_finite_is_refused, KINDS),
        (check_resume_is_bit_for_bit, KINDS),
    ]
}


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_bfloat16(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)


@pytest.mark.timeout(DEADLINE_S + 30)
def test_deepspeed_prints_nothing(launches: Launches) -> None:
    assert launches.printed == {2: ""}
