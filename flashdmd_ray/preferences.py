"""Preference pairs for the learner: candidates from the rollout pool, rewards from the reward pools, best against worst.

A request is answered while the distillation update of the same step runs, from the weights published after the step before. This fixed
lag is part of the algorithm, so a run is reproducible whatever the pools' speed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import Tensor

from flashdmd_ray.batch import Candidates, Metrics, PreferencePairs, Prompts, PublishedWeights, StepRng, choose
from flashdmd_ray.config import Config
from flashdmd_ray.losses.preference import combine_rewards, pair_weights, select_pairs
from flashdmd_ray.monitor import ranking
from flashdmd_ray.monitor.signals import probe_signals
from flashdmd_ray.runtime.protocol import Runtime, Task
from flashdmd_ray.scoring import REASONS, score

logger = logging.getLogger(__name__)
T = TypeVar("T")


class NothingScored(RuntimeError):
    """Raised when no reward was obtained for `preference.max_unscored` updates in a row."""


@dataclass(frozen=True)
class RatedPairs:
    """Preference pairs of one update with their metrics. `pairs` is None when no group was left to learn from, and for a probe.

    counts: "groups" requested, those "scored" by every optimised reward, "pairs" that are learnt from, and for each reason of
    `scoring.REASONS` the groups dropped for it, so that groups = scored + dropped. Empty for a probe.
    """

    pairs: PreferencePairs | None
    metrics: Metrics
    counts: Mapping[str, int] = field(default_factory=dict)


Ranked = tuple[int, Mapping[str, Tensor]]
"""Timestep of candidates, and label -> rewards float32 (B, K)."""


class PreferenceSource:
    """Makes the preference pairs of a step: candidates from the rollouts, scores from the reward pools, best against worst."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        prompts: Callable[[StepRng, str, int], Prompts],
    ):
        """prompts(rng, stream, count): the driver's choice of prompts."""
        self.config = config
        self.runtime = runtime
        self.prompts = prompts
        self._version = -1  # of the newest published weights
        self._published: Task[PublishedWeights]
        self._counts: Counter[str] = Counter()
        self._unscored: list[Mapping[str, int]] = []  # counts of the latest updates in a row without a score

    def due(self, step: int) -> bool:
        """Return True if `step` has preference updates."""
        preference = self.config.preference
        return (
            bool(preference.updates)
            and step >= preference.start_step
            and (step - preference.start_step) % preference.every == 0
        )

    def publish(self, step: int) -> None:
        """Give the rollouts the generator's weights before `step`, if that step needs them.

        They are read now and travel while the step goes on: only the rollouts wait for them.
        """
        if self.due(step):
            self._version = step
            self._published = self.runtime.publish(step)

    def request_ranking(self, rng: StepRng) -> list[Task[Ranked]]:
        """Start to measure, at the first step with preference updates, how latent rewards rank the candidates of this run."""
        preference = self.config.preference
        if not (preference.updates and rng.step == preference.start_step) or ranking.judge_of(self.config) is None:
            return []
        return [
            self._start(partial(self._ranking_candidates, rng, high, part), self._ranked)
            for high in range(self.config.high_noise_steps)
            for part in range(-(-ranking.GROUPS // preference.batch))
        ]

    def check_ranking(self, requests: Sequence[Task[Ranked]]) -> Metrics:
        """Judge what `request_ranking` started; {} for nothing.

        Raises ValueError for an optimised reward that cannot rank candidates, see `ranking.check`.
        """
        found: dict[int, list[Mapping[str, Tensor]]] = {}
        for task in requests:
            timestep, rewards = task.result(self._longest_s)
            found.setdefault(timestep, []).append(rewards)
        return ranking.check(self.config, found) if found else {}

    def request(self, rng: StepRng) -> list[Task[RatedPairs]]:
        """Start making the pairs of this step, and the hack monitor's probe; empty when it has no preference updates."""
        if not self.due(rng.step):
            return []
        updates = range(self.config.preference.updates)
        tasks = [
            self._start(partial(self._pair_candidates, rng, update), partial(self._rated_pairs, rng))
            for update in updates
        ]
        if self.probe_due(rng.step):
            tasks.append(self._start(self._probe_candidates, self._rate_probe))
        return tasks

    def _start(self, generate: Callable[[], Candidates], rate_them: Callable[[Candidates], T]) -> Task[T]:
        """Generate candidates and rate them beside the step. Beside the learner they are generated first: the step changes its weights."""
        if self.config.beside_learner("rollout"):
            return self.runtime.background(partial(rate_them, generate()))
        return self.runtime.background(lambda: rate_them(generate()))

    def probe_due(self, step: int) -> bool:
        """Return True if the hack monitor probes this step, which has preference updates."""
        preference, monitor = self.config.preference, self.config.monitor
        return monitor.enabled and (step - preference.start_step) // preference.every % monitor.every == 0

    def collect(self, requests: Sequence[Task[RatedPairs]]) -> Iterator[RatedPairs]:
        """Yield the results in order.

        Raises the error of a rollout, and NothingScored after `preference.max_unscored` updates in a row without a reward.
        """
        self._counts.clear()
        for task in requests:
            rated = task.result(self._longest_s)
            if rated.counts:
                self._record_counts(rated.counts)
            yield rated

    @property
    def _longest_s(self) -> float:
        """Seconds to wait for a request. Every call inside has a deadline and replays of its own: this only excludes waiting for ever."""
        deadlines = self.config.deadlines
        return 2 * deadlines.start_s + (deadlines.retries + 1) * (deadlines.call_s + deadlines.reward_s)

    def group_counts(self) -> Metrics:
        """Counts of this step's groups: preference/groups = preference/scored + all dropped/<reason>; preference/pairs are learnt from.

        preference/age: versions between the weights that made the candidates and the present ones.
        """
        if not self._counts:
            return {}
        counts = {f"preference/{name}": float(self._counts[name]) for name in ("groups", "scored", "pairs")}
        dropped = {f"dropped/{reason}": float(self._counts[reason]) for reason in REASONS}
        step = self.runtime.step if self.runtime.step is not None else self._version
        lag = {"preference/version": float(self._version), "preference/age": float(step - self._version)}
        return counts | dropped | lag

    def _record_counts(self, counts: Mapping[str, int]) -> None:
        self._counts.update(counts)
        self._unscored = [] if counts["scored"] else [*self._unscored, counts]
        if len(self._unscored) >= self.config.preference.max_unscored:
            lost = sum((Counter(counts) for counts in self._unscored), Counter())
            reasons = ", ".join(f"{lost[reason]} {reason}" for reason in REASONS if lost[reason])
            raise NothingScored(
                f"rewards: nothing could be scored in {len(self._unscored)} preference updates in a row up to step "
                f"{self.runtime.step} ({lost['groups']} groups: {reasons}); see the warnings before this line and the workers' logs"
            )

    def _candidates(self, prompts: Prompts, high: int, seed: int, decode: bool = True) -> Candidates:
        """Candidates as of `Rollout.candidates`, cut as the learner's ranks would share them: the same bits wherever rollouts live."""
        assert self._version >= 0, "candidates before publish()"
        weights, rollouts = self._published.result(), self.runtime.rollouts
        parts = prompts.split(self.config.placement.calls("rollout"))
        calls = [partial(rollouts.candidates, part, high, seed, weights, decode=decode) for part in parts]
        return Candidates.concat(self.runtime.parallel(*calls))

    def _pair_candidates(self, rng: StepRng, update: int) -> Candidates:
        stream = f"preference/{update}"
        return self._candidates(
            self.prompts(rng, stream, self.config.preference.batch),
            rng.index(f"{stream}/high", self.config.high_noise_steps),
            rng.seed(f"{stream}/noise"),
            decode=any(reward.reads_images for reward in self.config.due_rewards(rng.step)),
        )

    def _ranking_candidates(self, rng: StepRng, high: int, part: int) -> Candidates:
        stream = f"ranking/{high}/{part}"
        return self._candidates(self.prompts(rng, stream, self.config.preference.batch), high, rng.seed(stream))

    def _ranked(self, candidates: Candidates) -> Ranked:
        return candidates.next_timestep, score(candidates, self.config, self.runtime).rewards

    def _rated_pairs(self, rng: StepRng, candidates: Candidates) -> RatedPairs:
        due = [reward.pool_name for reward in self.config.due_rewards(rng.step)]
        scores = score(candidates, self.config, self.runtime, due)
        return rate(candidates, scores.rewards, self.config, scores.failures)

    def _probe_candidates(self) -> Candidates:
        """The same prompts and noise at every step: only the generator changes from one probe to the next.

        Starts from pure noise, where an error of the network is multiplied most: trouble shows there first.
        """
        preference = self.config.preference
        rng = StepRng(self.config.seed, preference.start_step)
        return self._candidates(self.prompts(rng, "monitor", preference.batch), 0, rng.seed("monitor/noise"))

    def _rate_probe(self, candidates: Candidates) -> RatedPairs:
        latent = [reward.label for reward in self.config.rewards if not reward.reads_images]
        rewards = score(candidates, self.config, self.runtime).rewards
        return RatedPairs(None, probe_signals(self.runtime.fetch(candidates.images), rewards, latent))


def rate(
    candidates: Candidates,
    rewards: Mapping[str, Tensor],
    config: Config,
    failures: Mapping[str, Sequence[str]] | None = None,
) -> RatedPairs:
    """Choose winner and loser of each prompt group, and measure how the rewards tell the candidates apart.

    rewards: label -> float32 (B, K). failures: label -> for each group the reason why it lacks that reward, "" where it has it; a reward
    that is not finite for no given reason counts as "not_finite". Only optimised rewards drop groups.
    """
    preference = config.preference
    weights = {reward.label: reward.weight for reward in config.rewards if not reward.held_out}
    combined, finite = combine_rewards(rewards, weights)
    winner, loser, margin, kept = select_pairs(combined, preference.threshold, preference.temperature)
    kept = kept & finite
    finite_values = {label: values[values.isfinite()] for label, values in rewards.items()}
    metrics = {f"reward/{label}": values.mean().item() for label, values in finite_values.items() if len(values)}
    metrics |= {
        "preference/kept": kept.float().mean().item(),
        "preference/dropped": (~finite).float().mean().item(),
        "preference/margin": margin[finite].mean().item() if bool(finite.any()) else 0.0,
    }
    metrics |= {
        f"missing/{reward.label}": (~rewards[reward.label].isfinite().all(dim=1)).float().mean().item()
        for reward in config.rewards
        if reward.held_out and reward.label in rewards
    }
    dropped = _drop_reasons(finite, list(weights), failures or {})
    if dropped:
        logger.warning(
            "step %d: %d of %d prompt groups dropped (%s)",
            candidates.version,
            dropped.total(),
            len(finite),
            ", ".join(f"{count} {reason}" for reason, count in dropped.items()),
        )
    counts = dropped | Counter(groups=len(finite), scored=int(finite.sum()), pairs=int(kept.sum()))
    pairs = PreferencePairs(
        prompts=candidates.prompts,
        noisy=candidates.noisy,
        winners=choose(candidates.values, winner),
        losers=choose(candidates.values, loser),
        weights=pair_weights(kept),
        margins=margin,
        timestep=candidates.timestep,
        next_timestep=candidates.next_timestep,
        version=candidates.version,
    )
    return RatedPairs(pairs if bool(kept.any()) else None, metrics, counts)


def _drop_reasons(finite: Tensor, labels: Sequence[str], failures: Mapping[str, Sequence[str]]) -> Counter[str]:
    """Count dropped groups by reason. A group counts once: the first reason of the first reward that has one."""
    counts: Counter[str] = Counter()
    for row in (~finite).nonzero().flatten().tolist():
        reasons = [failures[label][row] for label in labels if label in failures]
        counts[next(filter(None, reasons), "not_finite")] += 1
    return counts
