"""Build a runtime from a configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence

from flashdmd_ray.config import Config
from flashdmd_ray.run.progress import still
from flashdmd_ray.runtime.environment import limit_threads, on_gpu, use_loopback
from flashdmd_ray.runtime.local import LocalRuntime
from flashdmd_ray.runtime.placement import REWARDS, WorkerGroup, create_roles, rewards_of
from flashdmd_ray.runtime.protocol import Runtime

log = logging.getLogger(__name__)
Roles = Mapping[str, Mapping[str, str]]

ROLES: Roles = {
    "learner": {
        "generator": "flashdmd_ray.roles.generator:Generator",
        "score": "flashdmd_ray.roles.score_estimator:ScoreEstimator",
    },
    "discriminator": {"discriminator": "flashdmd_ray.roles.discriminator:Discriminator"},
    "rollout": {"rollouts": "flashdmd_ray.roles.rollout:Rollout"},
    "reward": {"rewards": "flashdmd_ray.roles.reward:Reward"},
}
"""Worker group -> name of the role in `Runtime` -> "module:Class"; "reward" stands for every pool of rewards.

Roles of one group live in the same processes: the EMA update moves all weights at every step, which is a local operation
only because the generator and the score estimator are neighbours. Groups that are placed within the learner join them."""

LATENT_ADVERSARY: Roles = {
    "learner": {
        "generator": "flashdmd_ray.roles.generator:Generator",
        "score": "flashdmd_ray.roles.latent_adversary:AdversarialScoreEstimator",
        "discriminator": "flashdmd_ray.roles.latent_adversary:LatentDiscriminator",
    },
    "rollout": ROLES["rollout"],
    "reward": ROLES["reward"],
}
"""DMD2: the discriminator is a head on the score estimator, so there is no group for it."""

STATEFUL = ("learner", "discriminator")


def roles_for(config: Config) -> Roles:
    """Return the role classes of this configuration."""
    return LATENT_ADVERSARY if config.adversarial.space == "latent" else ROLES


def worker_groups(config: Config, roles: Roles | None = None) -> list[WorkerGroup]:
    """List the worker groups of this configuration; without preference updates nothing is rolled out or rewarded.

    One process has one group, called after its first.
    """
    roles = roles_for(config) if roles is None else roles
    found: dict[str, dict[str, str]] = {}
    for kind in roles:
        if kind not in STATEFUL and not config.preference.updates:
            continue
        for name in config.reward_pools if kind == "reward" else (kind,):
            home = next(iter(found), name) if config.runtime == "local" else config.placement.home(name)
            named = {REWARDS + name if role == "rewards" else role: path for role, path in roles[kind].items()}
            found.setdefault(home, {}).update(named)
    return [_worker_group(config, name, mine) for name, mine in found.items()]


def _worker_group(config: Config, name: str, roles: Mapping[str, str]) -> WorkerGroup:
    placed = config.placement.of(name)
    return WorkerGroup(
        name=name,
        roles=roles,
        workers=placed.workers,
        cpus=placed.cpus,
        gpus=placed.gpus,
        stateful=name in STATEFUL,
        key=config.placement.key(name),
        config=config,
    )


def build_runtime(
    config: Config,
    roles: Roles | None = None,
    say: Callable[[str], None] = log.info,
    previous: Runtime | None = None,
) -> Runtime:
    """Start the roles where `config.runtime` says and load their models. Call from the main thread.

    roles: other classes with the same methods, by worker group; the configuration's own when None.
    say: takes one line of progress at a time; called from several threads.
    previous: the runtime of an attempt that failed, after `end_attempt`; what is whole of it lives on.

    Raises ValueError for impossible placements and unusable weights, WorkerError when workers do not come up in time.
    """
    groups = worker_groups(config, roles)
    if config.runtime == "local":
        return _build_local(config, groups, say)
    use_loopback(os.environ)
    from flashdmd_ray.runtime.ray_runtime import RayRuntime

    assert previous is None or isinstance(previous, RayRuntime)
    return RayRuntime(groups, say, previous)


def _build_local(config: Config, groups: Sequence[WorkerGroup], say: Callable[[str], None]) -> LocalRuntime:
    say(f"loading {', '.join(role for group in groups for role in group.roles)} in this process")
    limit_threads(config.placement.threads)
    if any(placed.gpus for placed in config.placement.groups()):
        on_gpu()
    (group,) = groups
    with still(say, lambda: "still loading models"):
        roles = create_roles(group, rank=0, world_size=1)
    return LocalRuntime(roles, rewards_of(roles))
