"""Weights and optimizer state on several ranks: averages, copies, initial weights, and checkpoints that fit any stage and rank count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flashdmd_ray.checkpoint import load_tensors, save_tensors
from flashdmd_ray.engine import skeleton
from tests.engine.common import (
    ALL_KINDS,
    FACTORS,
    KINDS,
    LR,
    RISE_AND_FALL,
    Network,
    PlainTorch,
    assert_equal_weights,
    assert_same,
    batch,
    engine,
    history,
    mean_loss,
    one_update,
    shard,
)
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters

ONWARD = {"torch": "zero3", "zero1": "torch", "zero2": "zero1", "zero3": "zero2"}
"""The kind of engine that continues what another one saved."""


BITWISE = ("zero1", "zero2", "torch-offload")


def check_an_average_reaches_the_masters(kind: str, directory: Path) -> None:
    """Two engines in one process; the score estimator goes on training from the averaged weights."""
    score, generator = engine(kind, seed=0, role="score estimator"), engine(kind, seed=1)
    plain, plain_generator = PlainTorch(seed=0), PlainTorch(seed=1)
    for step in range(3):
        one_update(generator, step)
        plain_generator.step(step)
        score.ema_update_from(generator, 0.9)
        with torch.no_grad():
            for p, q in zip(plain.module.parameters(), plain_generator.module.parameters(), strict=True):
                p.lerp_(q, 0.1)
        assert_equal_weights(score, plain.module)
        torch.testing.assert_close(score.module(batch(9)), plain.module(batch(9)), rtol=1e-3, atol=1e-4)
        one_update(score, 20 + step)
        plain.step(20 + step)
    assert_equal_weights(score, plain.module)
    assert_equal_weights(generator, plain_generator.module)


def check_n_averages(kind: str, directory: Path) -> None:
    score, generator = engine(kind, seed=0), engine(kind, seed=1)
    start, target = score.weights(), generator.weights()
    for _ in range(10):
        score.ema_update_from(generator, 0.9)
    for name, got in score.weights().items():
        expected = 0.9**10 * start[name].double() + (1 - 0.9**10) * target[name].double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def check_ranks_start_from_the_weights_of_rank_0(kind: str, directory: Path) -> None:
    trained = engine(kind, seed=dist.get_rank())
    assert_equal_weights(trained, Network(0), tolerance=0.0)
    one_update(trained, 0)
    plain = PlainTorch(seed=0)
    plain.step(0)
    assert_equal_weights(trained, plain.module)


def check_a_skeleton_is_filled_from_rank_0(kind: str, directory: Path) -> None:
    empty = skeleton(Network(5))
    assert all(p.is_meta for p in empty.parameters())
    source = Network(0).state_dict() if dist.get_rank() == 0 else None
    trained = engine(kind, module=empty, source=source)
    assert_equal_weights(trained, Network(0), tolerance=0.0)
    one_update(trained, 0)
    plain = PlainTorch(seed=0)
    plain.step(0)
    assert_equal_weights(trained, plain.module)


def check_copies_of_the_network_are_independent(kind: str, directory: Path) -> None:
    """The frozen reference policy is a copy of the trained network."""
    trained = engine(kind)
    one_update(trained, 0)
    reference = trained.copy()
    assert not any(p.requires_grad for p in reference.parameters())
    assert not reference.training
    plain = PlainTorch()
    plain.step(0)
    torch.testing.assert_close(reference(batch(1)), plain.module(batch(1)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        trained.module(batch(1)), reference(batch(1))
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    one_update(trained, 1)
    assert_same(dict(reference.state_dict()), expected)
    with torch.no_grad():
        assert not torch.equal(reference(batch(1)), trained.module(batch(1)))


def check_a_frozen_part_stays(kind: str, directory: Path) -> None:
    """As a LoRA base: no gradient, no master, sliced all the same under stage 3, complete in a copy."""
    network, plain = Network(0), PlainTorch()
    for module in (network, plain.module):
        module.body.requires_grad_(False)
    trained = engine(kind, module=network)
    for step in range(2):
        one_update(trained, step)
        (plain.module(batch(step)) - batch(step)[:, :2].cos()).square().mean().backward()
        for p in plain.module.body.parameters():
            p.grad = None
        trainable = [p for p in plain.module.parameters() if p.requires_grad]
        plain.optimizers.setdefault(
            "distillation", torch.optim.AdamW(trainable, lr=LR, betas=(0.9, 0.99), weight_decay=0.1)
        )
        for p in trainable:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        plain.optimizers["distillation"].step()
        plain.optimizers["distillation"].zero_grad()
    copied = trained.copy().state_dict()
    for name, expected in plain.module.state_dict().items():
        torch.testing.assert_close(copied[name], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(copied[name], expected) or not name.startswith("body")
    weights = trained.weights()
    if weights:
        assert {name.split(".")[0] for name in weights} == {"head", "spare", "unused"}


def check_resume_is_bit_for_bit(kind: str, directory: Path) -> None:
    straight, resumed = engine(kind, clip=0.1, rate=RISE_AND_FALL), engine(kind, seed=5, clip=0.1, rate=RISE_AND_FALL)
    one_update(resumed, 9, "forgotten")
    resumed.backward(mean_loss(resumed, shard(batch(9))))  # of an update that a fault prevented
    history(straight, range(3))
    state = straight.state()
    if dist.get_rank() == 0:
        save_tensors(
            directory / f"{kind}.safetensors", state
        )  # other kinds and the single rank of the second launch read it too
    else:
        assert state == {}
    dist.barrier()
    resumed.load_state(load_tensors(directory / f"{kind}.safetensors"))
    for trained in (straight, resumed):
        history(trained, range(3, 6))
    assert_same(resumed.state(), straight.state())
    assert_same(dict(resumed.copy().state_dict()), dict(straight.copy().state_dict()))
    finished = straight.state()
    if finished:
        save_tensors(directory / f"{kind}-finished.safetensors", finished)
    dist.barrier()


def check_another_kind_continues(kind: str, directory: Path) -> None:
    """Two ranks to two ranks, stage to stage: within rounding of never having changed."""
    trained = engine(ONWARD[kind], seed=5, clip=0.1, rate=RISE_AND_FALL)
    saved = load_tensors(directory / f"{kind}.safetensors")
    trained.load_state(saved)
    state = trained.state()
    if state:
        assert_same(state, saved)
    history(trained, range(3, 6))
    finished = trained.state()
    for name, value in load_tensors(directory / f"{kind}-finished.safetensors").items() if finished else ():
        assert (finished[name].double() - value.double()).square().mean().sqrt() <= 1e-5, name


def check_one_rank_continues_what_two_saved(kind: str, directory: Path) -> None:
    trained, plain = engine(ONWARD.get(kind, kind), seed=5, clip=0.1, rate=RISE_AND_FALL), PlainTorch(clip=0.1)
    trained.load_state(load_tensors(directory / f"{kind}.safetensors"))
    assert (trained.updates(), trained.updates("preference")) == (3, 3)
    assert_same(
        trained.state(), load_tensors(directory / f"{kind}.safetensors")
    )  # so two ranks can take up what one saves
    history(trained, range(3, 6))
    for step, factor in enumerate(FACTORS):
        plain.step(step, lr=LR * factor)
        plain.step(50 + step, "preference", lr=1e-3 * factor)
    assert_equal_weights(trained, plain.module)


def check_kinds_agree_in_one_rank(kind: str, directory: Path) -> None:
    """Against the torch engine: clipping, two objectives, warm-up, averages, a refused update. Stage 3 and DeepSpeed's offload sum the
    squares for its clipping in another order; the others agree in every bit."""
    kinds = ("torch", kind)
    trained = {k: engine(k, clip=0.1, rate=RISE_AND_FALL) for k in kinds}
    averaged = {k: engine(k, seed=1, role="score estimator") for k in kinds}
    for step in range(3):
        norms = {k: one_update(trained[k], step) for k in kinds}
        assert norms["torch"] == pytest.approx(norms[kind], rel=0 if kind in BITWISE else 1e-5)
        for k in kinds:
            one_update(trained[k], 60 + step, "preference", lr=1e-3)
            averaged[k].ema_update_from(trained[k], 0.9)
            one_update(averaged[k], step)
            trained[k].backward(trained[k](batch(step)).mean() * float("inf"))
            with pytest.raises(FloatingPointError):
                trained[k].update()
    for engines in (trained, averaged):
        if kind in BITWISE:
            assert_same(engines["torch"].state(), engines[kind].state())
            assert_same(dict(engines["torch"].copy().state_dict()), dict(engines[kind].copy().state_dict()))
        else:
            assert_equal_weights(engines[kind], engines["torch"].copy())
    if not kind.startswith("torch"):
        with pytest.raises(ValueError, match="cannot average with"):
            averaged["torch"].ema_update_from(trained[kind], 0.9)


def check_state_that_does_not_fit_is_refused(kind: str, directory: Path) -> None:
    trained = engine(kind)
    one_update(trained, 0)
    before = trained.state()
    wrong = {k: v for k, v in before.items() if k != "moments/distillation/exp_avg_sq/unused"}
    with pytest.raises(ValueError, match="exp_avg_sq: saved state lacks 'unused'"):
        trained.load_state(wrong)
    assert_same(trained.state(), before)
    with torch.no_grad():
        trained.module(shard(batch(0)))


CHECKS: Checks = {
    2: [
        (check_an_average_reaches_the_masters, ALL_KINDS),
        (check_n_averages, KINDS),
        (check_ranks_start_from_the_weights_of_rank_0, KINDS),
        (check_a_skeleton_is_filled_from_rank_0, KINDS),
        (check_copies_of_the_network_are_independent, KINDS),
        (check_a_frozen_part_stays, KINDS),
        (check_resume_is_bit_for_bit, ALL_KINDS),
        (check_another_kind_continues, KINDS),
    ],
    1: [
        (check_one_rank_continues_what_two_saved, KINDS),
        (check_kinds_agree_in_one_rank, [kind for kind in ALL_KINDS if kind != "torch"]),
        (check_state_that_does_not_fit_is_refused, KINDS),
    ],
}


@pytest.mark.timeout(2 * DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_on_several_ranks(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)


@pytest.mark.timeout(2 * DEADLINE_S + 30)
def test_deepspeed_prints_nothing(launches: Launches) -> None:
    assert launches.printed == {2: "", 1: ""}
