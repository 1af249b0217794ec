"""The average of the weights takes the network's place for a while, on any engine, and training does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashdmd_ray.engine.ema import EMA
from flashdmd_ray.engine.processes import rank
from flashdmd_ray.engine.state import under
from tests.engine.common import KINDS, Network, assert_same, batch, engine, one_update
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters


def check_the_average_computes_and_leaves_no_trace(kind: str, directory: Path) -> None:
    disturbed, straight = engine(kind), engine(kind)
    average = EMA(disturbed, 0.5)
    for step in range(3):
        for each in (disturbed, straight):
            one_update(each, step)
        average.update()
        before, mean, x = disturbed.state(), dict(average.state_items()), batch(9)
        with torch.no_grad():
            outside = disturbed.module(x)
            with average.applied():
                inside = disturbed.module(x)
            again = disturbed.module(x)
        assert torch.equal(outside, again)
        assert_same(disturbed.state(), before)
        assert_same(dict(average.state_items()), mean)
        assert step == 0 or not torch.equal(inside, outside)
        if rank() == 0:
            averaged = Network(seed=5)
            averaged.load_state_dict(under(mean, "weights/"))
            torch.testing.assert_close(inside, averaged(x), rtol=0, atol=1e-6)
    assert_same(disturbed.state(), straight.state())


def check_an_error_leaves_no_trace_either(kind: str, directory: Path) -> None:
    trained = engine(kind)
    average = EMA(trained, 0.5)
    for step in range(2):
        one_update(trained, step)
        average.update()
    before = trained.state()
    with pytest.raises(RuntimeError, match="no picture"), average.applied():
        raise RuntimeError("no picture")
    assert_same(trained.state(), before)


CHECKS: Checks = {
    2: [(check_the_average_computes_and_leaves_no_trace, KINDS)],
    1: [
        (check_the_average_computes_and_leaves_no_trace, KINDS),
        (check_an_error_leaves_no_trace_either, ["torch", "torch-offload"]),
    ],
}


@pytest.mark.timeout(2 * DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_on_several_ranks(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)
