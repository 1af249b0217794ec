"""Every group that was asked for is scored, or dropped and counted with its reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_roles import Generator, Reward, Rollout, toy_config

from flashdmd_ray.batch import Candidates, Prompts, StepRng
from flashdmd_ray.config import Config
from flashdmd_ray.preferences import NothingScored, PreferenceSource
from flashdmd_ray.runtime.errors import Closed, DeadlineExceeded, WorkerLost
from flashdmd_ray.runtime.local import LocalRuntime
from flashdmd_ray.scoring import REASONS, score

GROUPS = 4


class Troubled(Reward):
    """Fails for the groups that `trouble` names, by the text of their prompt."""

    def __init__(self, config: Config, trouble: dict[str, Any]) -> None:
        super().__init__(config, 0, 1)
        self.trouble = trouble
        self.sizes: list[int] = []

    def score(self, candidates: Candidates) -> dict[str, Tensor]:
        self.sizes.append(len(candidates))
        rewards = super().score(candidates)["toy"]
        for row, text in enumerate(candidates.prompts.texts):
            found = self.trouble.get(text)
            if isinstance(found, Exception):
                raise found
            if found is not None:
                rewards[row, 0] = found
        return {self.config.rewards[0].label: rewards}


def wanted(**more: Any) -> Config:
    rewards = [{"kind": "pickscore", "name": "a"}, {"kind": "pickscore", "name": "b", "held_out": True}]
    more = {"rewards": rewards, "preference__batch": GROUPS, "preference__updates": 2, "monitor__enabled": False} | more
    return toy_config("local", **more)


def prompts(draw: StepRng, purpose: str, count: int) -> Prompts:
    return Prompts(tuple(f"{purpose} {row}" for row in range(count)), torch.arange(count))


class Toys:
    """A local runtime of toy roles whose rewards have `trouble`: label -> text -> a value or an exception."""

    def __init__(self, config: Config, trouble: dict[str, dict[str, Any]]) -> None:
        self.rewards = {name: Troubled(config.for_pool(name), trouble.get(name, {})) for name in config.reward_pools}
        generator = Generator(config, 0, 1)
        roles = {"generator": generator, "rollouts": Rollout.from_neighbour(generator)}
        self.runtime = LocalRuntime(roles, self.rewards)
        self.source = PreferenceSource(config, self.runtime, prompts)

    def step(self, number: int = 0) -> tuple[list[Any], dict[str, float]]:
        self.runtime.step = number
        self.source.publish(number)
        answers = list(self.source.collect(self.source.request(StepRng(0, number))))
        return answers, self.source.group_counts()


def text(update: int, row: int) -> str:
    return f"preference/{update} {row}"


def test_groups_are_scored_or_dropped_with_their_reason(caplog):
    trouble = {text(0, 1): float("nan"), text(1, 0): float("inf"), text(1, 3): -float("inf")}
    with caplog.at_level(logging.WARNING):
        answers, counted = Toys(wanted(), {"a": trouble, "b": {text(0, 0): float("nan")}}).step()
    assert [answer.pairs.weights.gt(0).tolist()[1] for answer in answers] == [False, True]
    assert counted["preference/groups"] == 2 * GROUPS
    assert counted["dropped/not_finite"] == 3
    assert counted["preference/scored"] == 2 * GROUPS - 3
    assert counted["preference/pairs"] == sum(int((answer.pairs.weights > 0).sum()) for answer in answers)
    assert [answer.metrics["missing/b"] for answer in answers] == [1 / GROUPS, 0], "a held-out reward drops nothing"
    assert counted["preference/age"] == 0
    assert "1 of 4 prompt groups dropped (1 not_finite)" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DeadlineExceeded("too late"), "deadline"),
        (WorkerLost("gone"), "lost"),
        (KeyError("a"), "error"),
        (ValueError("bad"), "error"),
    ],
)
def test_a_call_that_fails_costs_its_own_groups(error, reason):
    config = wanted(placement__pools={"a": {"groups_per_call": 3}})
    toys = Toys(config, {"a": {text(0, 2): error}})
    answers, counted = toys.step()
    assert toys.rewards["a"].sizes == [2, 2, 2, 2], "4 groups in calls of at most 3: two of 2, for each of two updates"
    assert toys.rewards["b"].sizes == [4, 4]
    assert counted[f"dropped/{reason}"] == 2
    assert counted["preference/scored"] == 2 * GROUPS - 2
    assert answers[0].pairs is None or answers[0].pairs.weights[2:].tolist() == [0, 0]


@settings(deadline=None, max_examples=40)
@given(
    trouble=st.dictionaries(
        st.tuples(st.integers(0, 1), st.integers(0, GROUPS - 1)),
        st.sampled_from([float("nan"), float("inf"), KeyError("x"), WorkerLost("x"), DeadlineExceeded("x")]),
    ),
    per_call=st.integers(1, GROUPS),
)
def test_counts_add_up_whatever_fails(trouble, per_call):
    config = wanted(placement__pools={"a": {"groups_per_call": per_call}})
    answers, counted = Toys(config, {"a": {text(*where): what for where, what in trouble.items()}}).step()
    assert counted["preference/groups"] == 2 * GROUPS
    assert counted["preference/scored"] + sum(counted[f"dropped/{reason}"] for reason in REASONS) == 2 * GROUPS
    used = sum(int((answer.pairs.weights > 0).sum()) for answer in answers if answer.pairs is not None)
    assert counted["preference/pairs"] == used <= counted["preference/scored"]


def test_a_reward_that_answers_with_another_shape_is_an_error():
    class Short(Troubled):
        def score(self, candidates: Candidates) -> dict[str, Tensor]:
            return {label: values[:, :2] for label, values in super().score(candidates).items()}

    toys = Toys(wanted(), {})
    toys.rewards["a"].__class__ = Short
    assert toys.step()[1]["dropped/error"] == 2 * GROUPS


def test_the_run_ends_when_nothing_can_be_scored_for_long():
    always = {text(update, row): WorkerLost("gone") for update in range(2) for row in range(GROUPS)}
    toys = Toys(wanted(preference__max_unscored=3), {"a": always})
    toys.step(0)
    with pytest.raises(
        NothingScored, match=r"in 3 preference updates in a row up to step 1 \(12 groups: 12 lost\)"
    ) as ended:
        toys.step(1)
    assert "\n" not in str(ended.value)
    toys.rewards["a"].trouble = {}
    fresh = Toys(wanted(preference__max_unscored=3), {"a": always})
    fresh.step(0)
    fresh.rewards["a"].trouble = {}
    fresh.step(1)
    fresh.rewards["a"].trouble = always
    fresh.step(2)  # two again: those before do not count


def test_a_closed_pool_is_no_failed_reward():
    toys = Toys(wanted(), {"a": {text(0, 0): Closed("closed")}})
    with pytest.raises(Closed):
        toys.step()


def test_pools_that_look_at_latents_only_are_sent_no_images():
    config = toy_config("local", rewards=[{"kind": "latent"}, {"kind": "pickscore"}])
    seen = {}

    class Seeing:
        def __init__(self, label: str) -> None:
            self.label = label

        def score(self, candidates: Candidates) -> dict[str, Tensor]:
            seen[self.label] = candidates.images.shape[1]
            return {self.label: candidates.values.flatten(2).sum(2)}

    runtime = LocalRuntime({}, {"latent": Seeing("latent"), "pickscore": Seeing("pickscore")})
    values = torch.randn(2, 3, 4, 5, 5)
    images = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    candidates = Candidates(prompts(StepRng(0, 0), "x", 2), values[:, 0], values, images, 999, 749, 0)
    assert set(score(candidates, config, runtime).rewards) == {"latent", "pickscore"}
    assert seen == {"latent": 0, "pickscore": 3}
