"""Who runs where, how long anyone is waited for, and how a running job is reached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from flashdmd_ray.config.section import Count, PositiveFloat, PositiveInt, Section


class GroupConfig(Section):
    workers: PositiveInt = 1
    """Processes (ranks of a group, members of a pool)."""
    cpus: PositiveFloat = 0.5
    """Ray CPUs each worker reserves; a reservation, not a limit."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs, or a share of one, for each worker; its networks are on the first of them. 0: on the CPU."""
    gpu_memory_gib: PositiveFloat | None = None
    """Memory of one of these GPUs in GiB: a plan that needs more is refused before anything is loaded. A worker with a share of a GPU has
    that share of the memory. null: that of the GPUs of this machine, if it has any."""


class RoleGroupConfig(GroupConfig):
    within: Literal["learner"] | None = None
    """learner: these roles live in the learner's processes, on its GPUs, and share its work among the ranks; workers, cpus and gpus are
    the learner's then. Rollouts read the weights that are trained, so nothing is published. null: processes of their own. One process
    (runtime 'local') holds all roles in any case."""


class PoolConfig(RoleGroupConfig):
    max_workers: PositiveInt | None = None
    """null: always `workers`. Else the pool grows up to so many while calls wait, and shrinks back to `workers` when they do not."""
    shrink_after_s: PositiveFloat = 60.0
    """How long a grown pool must have been larger than its calls need. Above the time of a step: between steps no call waits."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.max_workers is not None and self.within is not None:
            raise ValueError("max_workers: a pool within the learner cannot grow; set it to null")
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(
                f"max_workers: {self.max_workers} is below workers {self.workers}; raise it, or null for a fixed size"
            )
        return self


class RewardPoolConfig(PoolConfig):
    groups_per_call: PositiveInt | None = None
    """Prompt groups in one call of a worker; null: an update is cut into as many calls as the learner has ranks. Fewer let several workers
    share one update, and lose less with a call that fails. It is the cut, never the number of workers, that a result depends on in its
    last bits. Not read within the learner."""


class PlacementConfig(Section):
    gpus: Literal["auto"] | Count = "auto"
    """GPUs to use where the sections below say nothing of workers and GPUs: a learner on each of so many, with all other roles within it.
    auto: all that this machine has, or the cluster that the job joins; where there is none, everything is on the CPU, as with 0."""
    learner: GroupConfig = GroupConfig()
    """Teacher, generator and score estimator; ZeRO shards over its ranks."""
    discriminator: RoleGroupConfig = RoleGroupConfig()
    """Decoder, SAM and heads."""
    rollout: PoolConfig = PoolConfig()
    """Candidate generation from the published weights."""
    reward: RewardPoolConfig = RewardPoolConfig()
    """Every pool of rewards that `pools` does not name."""
    pools: dict[str, RewardPoolConfig] = Field(default_factory=dict)
    """Single pools of rewards by name; what is not said here is as in `reward`."""
    threads: PositiveInt = 1
    """torch threads of every process, local runtime included: sums depend on it, so it is part of the configuration."""

    @model_validator(mode="before")
    @classmethod
    def _pools_start_from_reward(cls, tree: Any) -> Any:
        """Each entry of `pools` completed from `reward`, so that a dumped configuration says all of it."""
        if not isinstance(tree, Mapping) or not isinstance(tree.get("pools"), Mapping):
            return tree
        common = tree.get("reward") or {}
        if isinstance(common, GroupConfig):
            common = common.model_dump(exclude_unset=True)
        pools = {
            name: {**common, **pool} if isinstance(pool, Mapping) and isinstance(common, Mapping) else pool
            for name, pool in tree["pools"].items()
        }
        return {**tree, "pools": pools}

    WORKER_GROUPS: ClassVar = ("learner", "discriminator", "rollout")
    """Groups that are not pools of rewards."""

    @property
    def is_laid_out(self) -> bool:
        """True when a section says how many workers or GPUs there are, or where roles live."""
        plain = GroupConfig()
        return bool(self.pools) or any(
            (placed.workers, placed.gpus) != (plain.workers, plain.gpus)
            or getattr(placed, "within", None) is not None
            or getattr(placed, "max_workers", None) is not None
            for placed in self.groups()
        )

    def groups(self) -> list[GroupConfig]:
        """Every section that places workers."""
        return [self.learner, self.discriminator, self.rollout, self.reward, *self.pools.values()]

    def pool(self, name: str) -> RewardPoolConfig:
        """The section of a pool of rewards."""
        return self.pools.get(name, self.reward)

    def of(self, group: str) -> GroupConfig:
        """The section that places a group or pool: 'learner', 'discriminator', 'rollout' or the name of a pool of rewards."""
        section: GroupConfig = getattr(self, group) if group in self.WORKER_GROUPS else self.pool(group)
        return self.learner if isinstance(section, RoleGroupConfig) and section.within else section

    def home(self, group: str) -> str:
        """The group in whose processes the roles of `group` live: itself, or the learner."""
        return "learner" if self.of(group) is self.learner else group

    def key(self, group: str) -> str:
        """The setting that holds `of(group)`, for messages."""
        group = self.home(group)
        if group in self.WORKER_GROUPS:
            return f"placement.{group}"
        return f"placement.pools.{group}" if group in self.pools else "placement.reward"

    def chunks(self, pool: str, groups: int) -> int:
        """Number of calls that a pool of rewards gets `groups` prompt groups in; the learner's ranks share one."""
        size = self.pool(pool).groups_per_call
        return self.calls(pool) if size is None or self.pool(pool).within else -(-groups // size)

    def calls(self, group: str) -> int:
        """Number of calls that a pool gets an update in: one for each rank of the learner, or one that these ranks share."""
        return 1 if self.home(group) == "learner" else self.learner.workers


class DeadlineConfig(Section):
    start_s: PositiveFloat = 300.0
    """For a worker to come up and load its models."""
    call_s: PositiveFloat = 600.0
    """For one call of a role."""
    reward_s: PositiveFloat = 120.0
    """For one call of a reward worker."""
    retries: Count = 3
    """Replays of a call whose pool worker died, hung or failed."""
    checkpoint_s: PositiveFloat = 1800.0
    """For a checkpoint to be written; the next one, a stop and the end of the run wait for it."""
    stop_s: PositiveFloat = 600.0
    """After SIGTERM or Ctrl-C, for the step under way and its checkpoint; then the step is abandoned, and the newest checkpoint counts.
    Below what the system gives a job before it kills it."""
    attempts: PositiveInt = 3
    """Attempts without a new checkpoint, before the job ends, when workers of the learner or discriminator are lost."""


class ControlConfig(Section):
    enabled: bool = True
    """Serve the pools of a job on Ray for flashdmd scale, to look at and to resize (docs/operations.md)."""
    host: str = "127.0.0.1"
    """Address to listen on. Whoever reaches it still needs the token in control.json of the run folder, but nothing is encrypted."""
    port: Annotated[int, Field(strict=True, ge=0, le=65535)] = 0
    """0: any free one."""
