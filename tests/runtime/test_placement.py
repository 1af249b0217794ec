"""Placements that cannot work are refused with the reason."""

import pytest

from flashdmd_ray.config import parse_config
from flashdmd_ray.runtime.build import worker_groups
from flashdmd_ray.runtime.placement import Node, check_devices, check_placement


def groups(**placement: dict):
    return worker_groups(parse_config({"placement": placement}))


@pytest.mark.parametrize(
    ("placement", "nodes"),
    [
        ({}, [Node(2, 0)]),
        (
            {"learner": {"gpus": 1, "workers": 4}, "discriminator": {"gpus": 0.5}, "reward": {"gpus": 0.5}},
            [Node(8, 4), Node(8, 1)],
        ),
        ({"learner": {"gpus": 2, "workers": 2}}, [Node(8, 2), Node(8, 2)]),
        ({"reward": {"gpus": 0.6, "workers": 2}}, [Node(8, 2)]),
    ],
)
def test_fits(placement: dict, nodes: list[Node]) -> None:
    check_placement(groups(**placement), nodes)


@pytest.mark.parametrize(
    ("placement", "nodes", "message"),
    [
        (
            {"learner": {"gpus": 1}},
            [Node(2, 0)],
            r"placement\.learner: .*needs learner 1 x \(1 GPU, 0.5 CPUs\).*the cluster has 0 GPUs and 2 CPUs on 1 node",
        ),
        (
            {"reward": {"workers": 8}},
            [Node(2, 0)],
            r"placement\.reward: a worker with 0 GPUs and 0\.5 CPUs finds no room",
        ),
        ({"learner": {"gpus": 2}}, [Node(8, 1), Node(8, 1)], r"placement\.learner"),
        ({"reward": {"gpus": 0.6, "workers": 3}}, [Node(8, 2)], r"placement\.reward"),
        (
            {"learner": {"gpus": 0.5, "workers": 2}},
            [Node(8, 2)],
            r"placement\.learner\.gpus: two ranks cannot share a GPU",
        ),
        (
            {"rollout": {"gpus": 1.5}},
            [Node(8, 2)],
            r"placement\.rollout\.gpus: above 1 it must be a whole number, got 1\.5",
        ),
    ],
)
def test_refused(placement: dict, nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_placement(groups(**placement), nodes)


def test_groups_follow_the_configuration() -> None:
    assert [g.name for g in groups()] == ["learner", "discriminator", "rollout", "reward"]
    distilling = worker_groups(parse_config({"preference": {"updates": 0}}))
    assert [g.name for g in distilling] == ["learner", "discriminator"]
    baseline = worker_groups(
        parse_config({"adversarial": {"space": "latent"}, "score": {"ema": 1.0}, "preference": {"updates": 0}})
    )
    assert [(g.name, list(g.roles)) for g in baseline] == [("learner", ["generator", "score", "discriminator"])]


@pytest.mark.parametrize(("gpus", "assigned"), [(0, 0), (0.25, 1), (1, 1), (2, 2)])
def test_a_worker_must_see_the_gpus_it_was_given(gpus: float, assigned: int) -> None:
    group = next(g for g in groups(pools={"reward": {"gpus": gpus}}) if g.name == "reward")
    check_devices(group, assigned, assigned)
    with pytest.raises(
        ValueError, match=rf"placement\.pools\.reward\.gpus: .*given {assigned} GPUs?, but torch sees 8"
    ):
        check_devices(group, assigned, 8)
    with pytest.raises(ValueError, match=r"asked for, but Ray assigned 3 GPUs"):
        check_devices(group, 3, assigned)


def test_rewards_are_placed_by_pool() -> None:
    rewards = [{"kind": "pickscore"}, {"kind": "pickscore", "name": "b", "pool": "x"}, {"kind": "latent", "pool": "x"}]
    placement = {"reward": {"cpus": 2}, "pools": {"x": {"workers": 3}}}
    found = [
        g
        for g in worker_groups(parse_config({"rewards": rewards, "placement": placement}))
        if any(role.startswith("rewards/") for role in g.roles)
    ]
    assert [(g.name, g.workers, g.cpus, g.key) for g in found] == [
        ("pickscore", 1, 2, "placement.reward"),
        ("x", 3, 2, "placement.pools.x"),
    ]
    assert [list(g.roles) for g in found] == [["rewards/pickscore"], ["rewards/x"]]
    inside = groups(
        **{key: {"within": "learner"} for key in ("discriminator", "rollout", "reward")}, learner={"workers": 2}
    )
    (learner,) = inside
    assert learner.workers == 2
    assert list(learner.roles)[:4] == ["generator", "score", "discriminator", "rollouts"]
