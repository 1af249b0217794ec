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

import torch
from torch import Tensor

from flashdmd_ray.batch import Candidates, Draws, PreferencePairs, Prompts, PublishedWeights
from flashdmd_ray.config import Config
from flashdmd_ray.losses.preference import combine_rewards, pair_weights, select_pairs
from flashdmd_ray.monitor.signals import probe_signals
from flashdmd_ray.roles.networks import Metrics
from flashdmd_ray.runtime.protocol import Runtime, Task
from flashdmd_ray.scoring import REASONS, score

logger = logging.getLogger(__name__)


class NothingScored(RuntimeError):
    """No reward could be had for so many updates in a row that going on would be pointless."""


@dataclass(frozen=True)
class RatedPairs:
    """The pairs of one preference update and what their making showed. `pairs` is None when no group was left to learn from, or when
    nothing was to be learnt, as of a probe.

    counts: "groups" that were asked for, those "scored" by every optimised reward, "pairs" that are learnt from, and for each reason of
    `scoring.REASONS` the groups dropped for it, so that groups = scored + dropped. Empty of a probe.
    """

    pairs: PreferencePairs | None
    metrics: Metrics
    counts: Mapping[str, int] = field(default_factory=dict)


class PreferenceSource:
    """Asks the pools for the pairs of a step, one preference update after the other."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        prompts: Callable[[Draws, str, int], Prompts],
    ):
        """prompts(draw, purpose, count): the driver's choice of prompts."""
        self.config = config
        self.runtime = runtime
        self.prompts = prompts
        self.weights: PublishedWeights | None = None
        self._counts: Counter[str] = Counter()
        self._unscored: list[
            Mapping[str, int]
        ] = []  # the counts of the latest updates in a row that had nothing scored

    def due(self, step: int) -> bool:
        """Whether `step` has preference updates."""
        preference = self.config.preference
        return (
            bool(preference.updates)
            and step >= preference.start_step
            and (step - preference.start_step) % preference.every == 0
        )

    def publish(self, step: int) -> None:
        """Give the rollout pool the generator's weights as they are before `step`, if that step needs them."""
        if self.due(step):
            self.weights = self.runtime.publish(self.runtime.generator.weights(), version=step)

    def request(self, draw: Draws) -> list[Task[RatedPairs]]:
        """Start making the pairs of this step, and the hack monitor's probe; empty when it has no preference updates."""
        if not self.due(draw.step):
            return []
        updates = range(self.config.preference.updates)
        tasks = [self.runtime.background(partial(self._rated_pairs, draw, update)) for update in updates]
        if self.probes(draw.step):
            tasks.append(self.runtime.background(self._probe))
        return tasks

    def probes(self, step: int) -> bool:
        """Whether the hack monitor looks at a step that has preference updates."""
        preference, monitor = self.config.preference, self.config.monitor
        return monitor.enabled and (step - preference.start_step) // preference.every % monitor.every == 0

    def collect(self, requested: Sequence[Task[RatedPairs]]) -> Iterator[RatedPairs]:
        """The answers in order. Raises what a rollout raised, and NothingScored after `preference.max_unscored` updates in a row without
        a reward."""
        self._counts.clear()
        deadlines = self.config.deadlines
        # Every call inside has a deadline and replays of its own; this one only says that nothing here waits for ever.
        patience = 2 * deadlines.start_s + (deadlines.retries + 1) * (deadlines.call_s + deadlines.reward_s)
        for task in requested:
            answer = task.result(patience)
            if answer.counts:
                self._account(answer.counts)
            yield answer

    def counted(self) -> Metrics:
        """What became of the groups of this step, over its updates: preference/groups = preference/scored + all dropped/<reason>, and of
        the scored ones preference/pairs are learnt from. preference/age: versions between the weights that made them and these."""
        if self.weights is None or not self._counts:
            return {}
        named = {f"preference/{name}": float(self._counts[name]) for name in ("groups", "scored", "pairs")}
        dropped = {f"dropped/{reason}": float(self._counts[reason]) for reason in REASONS}
        step = self.runtime.step if self.runtime.step is not None else self.weights.version
        lag = {"preference/version": float(self.weights.version), "preference/age": float(step - self.weights.version)}
        return named | dropped | lag

    def _account(self, counts: Mapping[str, int]) -> None:
        self._counts.update(counts)
        self._unscored = [] if counts["scored"] else [*self._unscored, counts]
        if len(self._unscored) >= self.config.preference.max_unscored:
            lost = sum((Counter(counts) for counts in self._unscored), Counter())
            reasons = ", ".join(f"{lost[reason]} {reason}" for reason in REASONS if lost[reason])
            raise NothingScored(
                f"rewards: nothing could be scored in {len(self._unscored)} preference updates in a row up to step "
                f"{self.runtime.step} ({lost['groups']} groups: {reasons}); see the warnings before this line and the workers' logs"
            )

    def _rated_pairs(self, draw: Draws, update: int) -> RatedPairs:
        preference = self.config.preference
        purpose = f"preference/{update}"
        assert self.weights is not None, "request() before publish()"
        candidates = self.runtime.rollouts.candidates(
            self.prompts(draw, purpose, preference.batch),
            draw.index(f"{purpose}/high", self.config.high_noise_steps),
            draw.seed(f"{purpose}/noise"),
            self.weights,
        )
        scored = score(candidates, self.config, self.runtime)
        return rate(candidates, scored.rewards, self.config, scored.failures)

    def _probe(self) -> RatedPairs:
        """The same prompts and noise at every step: what changes from one probe to the next is the generator.

        From pure noise, where an error of the network is multiplied most: what goes wrong shows there first.
        """
        preference = self.config.preference
        draw = Draws(self.config.seed, preference.start_step)
        assert self.weights is not None, "request() before publish()"
        candidates = self.runtime.rollouts.candidates(
            self.prompts(draw, "monitor", preference.batch),
            0,
            draw.seed("monitor/noise"),
            self.weights,
            decode=True,
        )
        latent = [reward.label for reward in self.config.rewards if not reward.reads_images]
        rewards = score(candidates, self.config, self.runtime).rewards
        return RatedPairs(None, probe_signals(candidates.images, rewards, latent))


def rate(
    candidates: Candidates,
    rewards: Mapping[str, Tensor],
    config: Config,
    failures: Mapping[str, Sequence[str]] | None = None,
) -> RatedPairs:
    """Winner and loser of each prompt group, and the figures that tell whether the rewards are of use.

    rewards: label -> float32 (B, K). failures: label -> the reason for each group without that reward, "" for others; where it says
    nothing, a reward that is not finite is "not_finite". Only optimised rewards drop groups.
    """
    preference = config.preference
    weights = {reward.label: reward.weight for reward in config.rewards if not reward.held_out}
    combined, finite = combine_rewards(rewards, weights)
    winner, loser, margin, kept = select_pairs(combined, preference.threshold, preference.temperature)
    kept = kept & finite
    rows = torch.arange(len(winner))
    seen = {label: values[values.isfinite()] for label, values in rewards.items()}
    metrics = {f"reward/{label}": values.mean().item() for label, values in seen.items() if len(values)}
    metrics |= {
        "preference/kept": kept.float().mean().item(),
        "preference/dropped": (~finite).float().mean().item(),
        "preference/margin": margin[finite].mean().item() if bool(finite.any()) else 0.0,
    }
    metrics |= {
        f"missing/{reward.label}": (~rewards[reward.label].isfinite().all(dim=1)).float().mean().item()
        for reward in config.rewards
        if reward.held_out
    }
    dropped = _why(finite, list(weights), failures or {})
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
        winners=candidates.values[rows, winner],
        losers=candidates.values[rows, loser],
        weights=pair_weights(kept),
        margins=margin,
        timestep=candidates.timestep,
        next_timestep=candidates.next_timestep,
        version=candidates.version,
    )
    return RatedPairs(pairs if bool(kept.any()) else None, metrics, counts)


def _why(finite: Tensor, labels: Sequence[str], failures: Mapping[str, Sequence[str]]) -> Counter[str]:
    """Reason -> groups dropped for it. A group counts once: the first reason of the first reward that has one."""
    found: Counter[str] = Counter()
    for row in (~finite).nonzero().flatten().tolist():
        reasons = [failures[label][row] for label in labels if label in failures]
        found[next(filter(None, reasons), "not_finite")] += 1
    return found
