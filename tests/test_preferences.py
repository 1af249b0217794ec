"""From rewards to preference pairs."""

import pytest
import torch

from flashdmd_ray.batch import Candidates, Prompts, StepRng, noise, to_uint8
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.preferences import PreferenceSource, rate


@pytest.fixture
def config() -> Config:
    return parse_config(
        {"rewards": [{"kind": "pickscore"}, {"kind": "latent", "weight": 0.5}], "preference": {"threshold": 0.2}}
    )


@pytest.fixture
def candidates() -> Candidates:
    prompts = Prompts(("a", "b", "c"), torch.arange(3))
    values = noise(prompts.indices, (4, 2, 3, 3), 0, "z")
    return Candidates(prompts, values[:, 0], values, to_uint8(values), timestep=999, next_timestep=749, version=5)


def test_best_and_worst_become_the_pair(config, candidates):
    order = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [5.0, 9.0, 1.0, 5.0]])
    rated = rate(candidates, {"pickscore": order, "latent": order * 7 + 3}, config)
    pairs = rated.pairs
    for row, (best, worst) in enumerate([(3, 0), (0, 3), (1, 2)]):
        assert torch.equal(pairs.winners[row], candidates.values[row, best])
        assert torch.equal(pairs.losers[row], candidates.values[row, worst])
    assert pairs.weights.tolist() == [1, 1, 1]
    assert (pairs.timestep, pairs.next_timestep, pairs.version) == (999, 749, 5)
    assert rated.metrics["preference/kept"] == 1
    assert rated.metrics["reward/latent"] == pytest.approx((order * 7 + 3).mean().item())


def test_a_failed_reward_drops_its_group_and_is_counted(config, candidates):
    good = torch.arange(12.0).reshape(3, 4)
    bad = good.clone()
    bad[1, 2] = float("nan")
    rated = rate(candidates, {"pickscore": good, "latent": bad}, config)
    assert rated.pairs.weights.tolist() == [1.5, 0, 1.5]
    assert rated.metrics["preference/dropped"] == pytest.approx(1 / 3)


def test_nothing_to_learn_from_gives_no_pairs(config, candidates):
    equal = torch.ones(3, 4)
    assert rate(candidates, {"pickscore": equal, "latent": equal}, config).pairs is None
    broken = torch.full((3, 4), float("inf"))
    rated = rate(candidates, {"pickscore": broken, "latent": equal}, config)
    assert rated.pairs is None
    assert rated.metrics["preference/dropped"] == 1


@pytest.mark.parametrize(("every", "start", "due"), [(1, 0, [0, 1, 2, 3, 4, 5]), (2, 1, [1, 3, 5]), (3, 4, [4])])
def test_which_steps_have_preference_updates(every, start, due):
    config = parse_config({"preference": {"every": every, "start_step": start}})
    source = PreferenceSource(config, runtime=None, prompts=None)
    assert [step for step in range(6) if source.due(step)] == due
    assert not any(
        PreferenceSource(parse_config({"preference": {"updates": 0}}), None, None).due(step) for step in range(6)
    )


def test_draws_of_one_step_are_independent_of_each_other():
    draw = StepRng(1, 2)
    assert torch.equal(draw.timesteps("a", 5, 0, 1000), StepRng(1, 2).timesteps("a", 5, 0, 1000))
    assert not torch.equal(draw.timesteps("a", 50, 0, 1000), draw.timesteps("b", 50, 0, 1000))
    assert not torch.equal(draw.timesteps("a", 50, 0, 1000), StepRng(1, 3).timesteps("a", 50, 0, 1000))
