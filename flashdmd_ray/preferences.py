"""Preference pairs for the learner: candidates from the rollout pool, rewards from the reward pool, best against worst.

A request is answered while the distillation update of the same step runs, from the weights published after the step before. This fixed
lag is part of the algorithm, so a run is reproducible whatever the pools' speed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from flashdmd_ray.batch import Candidates, Draws, PreferencePairs, Prompts, PublishedWeights
from flashdmd_ray.config import Config
from flashdmd_ray.monitor.signals import probe_signals
from flashdmd_ray.objectives.preference import combine_rewards, pair_weights, select_pairs
from flashdmd_ray.roles.networks import Metrics
from flashdmd_ray.runtime.protocol import Runtime, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatedPairs:
    """The pairs of one preference update and what their making showed. `pairs` is None when no group was left to learn from, or when
    nothing was to be learnt, as of a probe."""

    pairs: PreferencePairs | None
    metrics: Metrics


class PreferenceSource:
    """Asks the pools for the pairs of a step, one preference update after the other."""

    def __init__(self, config: Config, runtime: Runtime, prompts: Callable[[Draws, str, int], Prompts]):
        """prompts(draw, purpose, count): the driver's choice of prompts."""
        self.config = config
        self.runtime = runtime
        self.prompts = prompts
        self.weights: PublishedWeights | None = None

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
        return rate(candidates, self._rewards(candidates), self.config)

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
        return RatedPairs(None, probe_signals(candidates.images, self._rewards(candidates), latent))

    def _rewards(self, candidates: Candidates) -> dict[str, torch.Tensor]:
        """label -> (B, K), from every pool at once."""
        answers = self.runtime.parallel(*[partial(pool.score, candidates) for pool in self.runtime.rewards.values()])
        return {label: values for answer in answers for label, values in answer.items()}


def rate(candidates: Candidates, rewards: dict[str, torch.Tensor], config: Config) -> RatedPairs:
    """Winner and loser of each prompt group, and the figures that tell whether the rewards are of use."""
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
    if not bool(finite.all()):
        logger.warning(
            "step %d: %d of %d prompt groups dropped, a reward was not finite",
            candidates.version,
            int((~finite).sum()),
            len(finite),
        )
    if not bool(kept.any()):
        return RatedPairs(None, metrics)
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
    return RatedPairs(pairs, metrics)
