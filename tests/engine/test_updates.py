"""One update of every kind of engine on two ranks equals plain torch on the whole batch, and each DeepSpeed trap stays closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.engine.common import (
    ALL_KINDS,
    BATCH,
    FACTORS,
    KINDS,
    LR,
    RISE_AND_FALL,
    PlainTorch,
    assert_equal_weights,
    assert_same,
    batch,
    engine,
    mean_loss,
    one_update,
    shard,
)
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters


def check_mean_over_ranks(kind: str, directory: Path) -> None:
    trained, plain = engine(kind), PlainTorch()
    for step in range(5):
        assert one_update(trained, step) == pytest.approx(plain.step(step), rel=1e-5)
    assert_equal_weights(trained, plain.module)


def check_objectives_keep_their_own_moments(kind: str, directory: Path) -> None:
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        one_update(trained, step)
        plain.step(step)
        if step >= 1:
            one_update(trained, 50 + step, "preference", lr=1e-3)
            plain.step(50 + step, "preference", lr=1e-3)
    assert_equal_weights(trained, plain.module)


def check_two_gradients_through_one_backward_of_a_sum(kind: str, directory: Path) -> None:
    """The generator's update: two forwards, two critics' gradients, after forwards without gradients. Plain torch adds two backwards."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(3):
        x, y, g, h = (batch(100 * step + k)[:, :width] for k, width in ((0, 3), (1, 3), (2, 2), (3, 2)))
        with torch.no_grad():
            trained.module(x)
        coarse, fine = trained(shard(x)), trained(shard(y))
        # Critics answer with gradients of means over the rank's samples; the average over ranks makes the mean over all.
        trained.backward((coarse * shard(g)).sum() + (fine * shard(h)).sum())
        trained.update()
        plain.module(x).backward(g / 2)
        plain.module(y).backward(h / 2)
        plain.update()
    assert_equal_weights(trained, plain.module)


def check_forwards_without_gradients_between_forward_and_backward(kind: str, directory: Path) -> None:
    """The second forward of an update starts from a chain of hops without gradients, which begins at the first one's output."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(3):
        losses = []
        for model, without, x in (
            (trained, trained.module, shard(batch(step))),
            *[(plain.module,) * 2 + (batch(step),)],
        ):
            coarse = model(x)
            with torch.no_grad():
                hop = without(torch.cat([coarse, x[:, :1]], 1))
                hop = without(torch.cat([hop, x[:, :1]], 1))
            losses.append((coarse + model(torch.cat([hop, x[:, :1]], 1))).square().mean())
        trained.backward(losses[0])
        trained.update()
        losses[1].backward()
        plain.update()
    assert_equal_weights(trained, plain.module)


def check_second_backward_is_refused(kind: str, directory: Path) -> None:
    trained = engine(kind)
    trained.backward(mean_loss(trained, shard(batch(0))))
    with pytest.raises(AssertionError, match="two backward calls before one update"):
        trained.backward(mean_loss(trained, shard(batch(1))))


def check_micro_batches_make_the_same_update(kind: str, directory: Path) -> None:
    """4 samples a rank in 3 micro-batches of 1, 1 and 2; updates without micro-batches before, between and after."""
    trained, plain = engine(kind, clip=0.1, accumulation=3), PlainTorch(clip=0.1)
    for step in range(4):
        objective = "preference" if step == 3 else "distillation"
        if step == 1:
            one_update(trained, step)
        else:
            mine, loss = shard(batch(step)), torch.zeros(())
            sizes = []
            for rows in trained.micro_batches(len(mine)):
                sizes.append(len(mine[rows]))
                loss += trained.backward(mean_loss(trained, mine[rows]))
            assert sizes == [1, 1, 2]
            torch.testing.assert_close(loss, mean_loss(trained.module, mine).detach())
            trained.update(objective)
        plain.step(step, objective)
    assert_equal_weights(trained, plain.module)


def check_micro_batches_are_all_used(kind: str, directory: Path) -> None:
    trained = engine(kind, accumulation=2)
    mine = shard(batch(0))
    with pytest.raises(AssertionError, match="1 samples cannot be cut into 2 micro-batches"):
        list(trained.micro_batches(1))
    with pytest.raises(AssertionError, match="a micro-batch without a backward"):
        list(trained.micro_batches(4))
    trained = engine(kind, accumulation=2)
    for rows in trained.micro_batches(4):
        trained.backward(mean_loss(trained, mine[rows]))
        break
    with pytest.raises(AssertionError, match="update before the last of micro_batches"):
        trained.update()


def check_not_finite_in_one_micro_batch(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, accumulation=2), PlainTorch()
    one_update(trained, 0)
    plain.step(0)
    mine = shard(batch(1))
    for rows in trained.micro_batches(len(mine)):
        bad = rows.start == 0 and dist.get_rank() == 1
        trained.backward(mean_loss(trained, mine[rows]) + (float("nan") if bad else 0.0))
    with pytest.raises(FloatingPointError, match="the loss of distillation update 2 is not finite"):
        trained.update()
    one_update(trained, 2)
    plain.step(2)
    assert_equal_weights(trained, plain.module)


def check_a_parameter_left_out_of_an_update(kind: str, directory: Path) -> None:
    """One objective uses a layer that the other does not: its gradient there is zero, not the last one it had."""
    trained, plain = engine(kind, clip=0.5), PlainTorch(clip=0.5)
    for step in range(4):
        uses = step % 2 == 0
        objective = "distillation" if uses else "preference"
        trained.backward(trained(shard(batch(step)), uses).square().mean())
        norm = trained.update(objective)
        plain.module(batch(step), uses).square().mean().backward()
        assert norm == pytest.approx(plain.update(objective), rel=1e-5)
    assert_equal_weights(trained, plain.module)


def check_clipping(kind: str, directory: Path) -> None:
    """A small limit scales as torch does; a limit above the norm leaves large gradients alone (DeepSpeed's default would cut at 1)."""
    for clip, scale in ((0.05, 1.0), (1e6, 1000.0)):
        trained, plain, norms = engine(kind, clip=clip), PlainTorch(clip=clip), []
        for step in range(4):
            factor = scale if step == 0 else 1.0  # one outlier: AdamW alone hides a constant factor
            trained.backward(factor * mean_loss(trained, shard(batch(step))))
            (factor * mean_loss(plain.module, batch(step))).backward()
            norms.append(plain.update())
            assert trained.update() == pytest.approx(norms[-1], rel=1e-5)
        assert min(norms) > clip or max(norms) > 1, "this check would pass without clipping"
        assert_equal_weights(trained, plain.module)


def check_rates_rise_and_fall(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, rate=RISE_AND_FALL), PlainTorch()
    for step, factor in enumerate(FACTORS):
        one_update(trained, step)
        plain.step(step, lr=LR * factor)
    assert_equal_weights(trained, plain.module)


def check_uneven_shards(kind: str, directory: Path) -> None:
    """6 and 2 samples: the mean over all 8, not the mean of the two ranks' means."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        mine = batch(step).split([6, 2])[dist.get_rank()]
        trained.backward(trained.shard_weight(len(mine)) * mean_loss(trained, mine))
        trained.update()
        plain.step(step)
    assert_equal_weights(trained, plain.module)
    assert trained.shard_weight(4) == 1.0


def check_shards_padded_with_weight_zero(kind: str, directory: Path) -> None:
    """5 samples padded to 8: every rank makes the same calls, padding counts for nothing, the loss is normalised by the global count."""
    trained, plain = engine(kind), PlainTorch()
    for step in range(4):
        weights = (torch.arange(BATCH) < 5).float()
        losses = (trained(shard(batch(step)))).square().mean(1)
        trained.backward(dist.get_world_size() * (losses * shard(weights)).sum() / 5)
        trained.update()
        plain.module(batch(step)[:5]).square().mean().backward()
        plain.update()
    assert_equal_weights(trained, plain.module)


def check_not_finite_on_one_rank_stops_all(kind: str, directory: Path) -> None:
    trained, plain = engine(kind, clip=0.1), PlainTorch(clip=0.1)
    one_update(trained, 0)
    plain.step(0)
    before = trained.state()
    bad = dist.get_rank() == 1
    for what, poison in (
        ("loss", lambda y: y.mean() + float("nan")),
        ("gradient", lambda y: (y * 0).square().sqrt().sum()),
    ):
        output = trained(shard(batch(1)))
        trained.backward(poison(output) if bad else output.mean())
        with pytest.raises(FloatingPointError, match=f"generator: the {what} of distillation update 2 is not finite"):
            trained.update()
        assert_same(trained.state(), before)
    one_update(trained, 2)
    plain.step(2)
    assert_equal_weights(trained, plain.module)


def check_gradients_through_the_network_to_its_inputs(kind: str, directory: Path) -> None:
    """A critic's gradient with respect to its inputs leaves nothing behind in the critic."""
    trained, plain = engine(kind), PlainTorch()
    x = shard(batch(0)).requires_grad_()
    torch.autograd.grad(trained.module(x).sum(), x)
    one_update(trained, 1)
    plain.step(1)
    assert_equal_weights(trained, plain.module)


CHECKS: Checks = {
    2: [
        (check_mean_over_ranks, ALL_KINDS),
        (check_objectives_keep_their_own_moments, ALL_KINDS),
        (check_two_gradients_through_one_backward_of_a_sum, KINDS),
        (check_forwards_without_gradients_between_forward_and_backward, KINDS),
        (check_second_backward_is_refused, KINDS),
        (check_micro_batches_make_the_same_update, ALL_KINDS),
        (check_micro_batches_are_all_used, KINDS),
        (check_not_finite_in_one_micro_batch, ALL_KINDS),
        (check_a_parameter_left_out_of_an_update, ALL_KINDS),
        (check_clipping, ALL_KINDS),
        (check_rates_rise_and_fall, KINDS),
        (check_uneven_shards, KINDS),
        (check_shards_padded_with_weight_zero, KINDS),
        (check_not_finite_on_one_rank_stops_all, ALL_KINDS),
        (check_gradients_through_the_network_to_its_inputs, KINDS),
    ]
}


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_against_plain_torch(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)


@pytest.mark.timeout(DEADLINE_S + 30)
def test_deepspeed_prints_nothing(launches: Launches) -> None:
    assert launches.printed == {2: ""}
