"""What each role does in one training step, and with it its operations and the activations of a rank (flashdmd_ray/driver.py, roles/).

Every figure is for one rank and one step, the mean over steps where not all are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

from flashdmd_ray.config import Config
from flashdmd_ray.plan import specs
from flashdmd_ray.plan.clip import PIXEL_BYTES, reward_use, text_flops
from flashdmd_ray.plan.costs import Cost, cost_of
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.parts import FLOAT, brings_text, reads_texts

SHEET = 10
"""Prompts of a sample sheet (sheet.py)."""
TO_INPUTS = 2 / 3
"""Of a forward and a backward, what is left when no weight gets a gradient."""
TEXT_GROUP = 8
"""Prompts are encoded so many at a time (models/family.py)."""


@dataclass(frozen=True)
class Work:
    """A role's share of a step. flops: operations. peak: bytes of activations at most. beside: of these, what is needed while the
    generator waits for its critics. kept: what it keeps meanwhile."""

    part: str
    group: str
    flops: float
    peak: float
    beside: float = 0.0
    kept: float = 0.0


def work_of(config: Config, models: Models) -> list[Work] | None:
    """Of every role, by the name of its part; None when an architecture is unknown."""
    groups: list[Callable[[Config, Models], list[Work] | None]] = [_learner]
    if models.sam is not None:
        groups.append(_discriminator)
    if config.preference.updates:
        groups.append(_rollout)
        groups += [partial(_reward_pool, pool=pool) for pool in config.reward_pools]
    found = [group(config, models) for group in groups]
    return None if None in found else [work for works in found for work in works or []]


def peak_of(works: Sequence[Work]) -> float:
    """The most activations of one process, whose roles work one after the other."""
    kept = sum(work.kept for work in works)
    return max([work.peak for work in works] + [kept + work.beside for work in works], default=0.0)


def _learner(config: Config, models: Models) -> list[Work] | None:
    teacher, generator, score = (
        cost_of(spec)
        for spec in (
            specs.teacher(config, models),
            specs.trained(config, models, "generator"),
            specs.trained(config, models, "score"),
        )
    )
    if teacher is None or generator is None or score is None:
        return None
    ranks = config.placement.learner.workers
    count = config.batch // ranks if config.preference.distill else 0
    vae = cost_of(specs.vae(config, models))
    captions = config.ttur * count if models.sam is None else 0  # DMD2's head judges real images with their captions
    prompts = count * config.ttur + captions + config.preference.batch // ranks * updates(config)
    works = [
        _teacher(config, teacher, count),
        _generator(config, generator, count),
        _score(config, score, count),
        _texts(config, models, "learner", prompts),
    ]
    if vae is not None:
        encode = vae.uses["encode"]
        encoded = captions if config.data.latents is None else 0
        peak = max(vae.uses["decode"].peak(_drawn(config)), encode.peak(encoded / config.ttur))
        works.append(Work("VAE", "learner", encode.flops(encoded), peak))
    if config.preference.updates:
        reference = generator.uses["forward"]
        prompts = config.preference.batch // ranks
        works.append(
            Work("reference policy", "learner", updates(config) * reference.flops(prompts), reference.peak(prompts))
        )
    return works


def _drawn(config: Config) -> int:
    """Images that a rank decodes at a time for a sample sheet. It draws few and seldom: their operations are left out."""
    return min(config.evaluation.batch, ceil(SHEET / config.placement.learner.workers))


def updates(config: Config) -> float:
    """Preference updates of a step."""
    return config.preference.updates / config.preference.every


def probes(config: Config) -> float:
    """Rollouts of a step that only the hack monitor looks at."""
    return 1 / (config.preference.every * config.monitor.every) if config.monitor_enabled else 0.0


def _cut(config: Config, count: int) -> int:
    """The largest of the micro-batches of an update."""
    return ceil(count / config.engine.accumulation)


def _teacher(config: Config, cost: Cost, count: int) -> Work:
    forward, branches = cost.uses["forward"], 1 if config.matching.guidance_scale == 1 else 2
    return Work("teacher", "learner", branches * forward.flops(count), forward.peak(count), beside=forward.peak(count))


def _generator(config: Config, cost: Cost, count: int) -> Work:
    """Two forwards for one update, simulations before and between them, and the preference updates.

    In one piece the graphs of both forwards wait for the critics. In micro-batches the forwards are made again, one at a time.
    """
    forward, training = cost.uses["forward"], cost.uses["training"]
    simulated, graphs = _forwards(config)
    cuts, micro = config.engine.accumulation, _cut(config, count)
    flops = simulated * forward.flops(count) + graphs * training.flops(count, cuts)
    flops += (config.ttur - 1) * (simulated + graphs) * forward.flops(count)
    peak = max(forward.peak(count), (graphs - 1) * training.kept(micro) + training.peak(micro))
    if cuts > 1:
        flops += graphs * forward.flops(count)
    if config.preference.updates:
        prompts = config.preference.batch // config.placement.learner.workers
        part = _cut(config, prompts)
        flops += updates(config) * training.flops(prompts, cuts)
        peak = max(peak, training.peak(part), training.kept(part) + forward.peak(part))
    kept = graphs * training.kept(micro) if cuts == 1 else 0.0
    return Work("generator", "learner", flops, peak, kept=kept)


def _forwards(config: Config) -> tuple[float, int]:
    """Forwards of one prediction: without gradient, on average, and with one."""
    steps = len(config.sampling.timesteps)
    if config.matching.timestep_split == "shared" or steps == 1:
        # To the step that is drawn, or to the deepest of many; and no fine forward.
        return (steps - 1) / (2 if config.matching.timestep_per == "batch" else 1), 1
    return steps, 2  # to the deepest step that is drawn, and on from it to the end


def _score(config: Config, cost: Cost, count: int) -> Work:
    forward, training = cost.uses["forward"], cost.uses["training"]
    cuts, micro = config.engine.accumulation, _cut(config, count)
    flops = forward.flops(count) + config.ttur * training.flops(count, cuts)
    peak = max(forward.peak(count), training.peak(micro))
    if mid := cost.uses.get("mid"):  # DMD2's head judges the generator's samples, then those and as many real ones
        flops += mid.flops(count) * TO_INPUTS + config.ttur * mid.flops(2 * count)
        peak = max(peak, training.kept(micro) + mid.peak(2 * micro))
    return Work("score estimator", "learner", flops, peak, beside=forward.peak(count))


def _texts(config: Config, models: Models, group: str, prompts: float) -> Work:
    """Text encoders on prompts that were not met before. Their activations are small beside a denoiser's."""
    if config.data.embeddings is not None:
        return Work("text encoders", group, 0.0, 0.0)
    encoded = TEXT_GROUP * ceil(prompts / TEXT_GROUP)
    return Work("text encoders", group, encoded * sum(text_flops(text) for text in models.texts), 0.0)


def _discriminator(config: Config, models: Models) -> list[Work] | None:
    critic, vae = cost_of(specs.critic(config, models)), cost_of(specs.vae(config, models))
    if critic is None or vae is None or models.image is None:
        return None
    count = config.batch // config.placement.discriminator.workers if config.preference.distill else 0
    cuts, micro = config.engine.accumulation, _cut(config, count)
    gradient, update, decode, encode = (
        critic.uses["gradient"],
        critic.uses["update"],
        vae.uses["decode"],
        vae.uses["encode"],
    )
    height, width = models.image
    reals = PIXEL_BYTES * height * width * count
    flops = gradient.flops(count, cuts) + config.ttur * update.flops(2 * count, cuts)
    images = config.ttur * decode.flops(count, cuts)
    peaks = [
        gradient.peak(micro),
        reals + decode.peak(micro),
        reals + _pixels(models, 2 * micro) + update.peak(2 * micro),
    ]
    if config.adversarial.real_through_vae:
        images += config.ttur * (decode.flops(count) + (encode.flops(count) if config.data.latents is None else 0))
        peaks += [decode.peak(count), encode.peak(count)]
    works = [
        Work("discriminator: SAM", "discriminator", flops, max(peaks), beside=gradient.peak(micro)),
        Work("VAE", "discriminator", images, decode.peak(micro)),
    ]
    if config.adversarial.prompt_projection:
        works.append(_texts(config, models, "discriminator", (1 + config.ttur) * count))
    return works


def _pixels(models: Models, count: float) -> float:
    assert models.image is not None, "asked for after the image size is known"
    return PIXEL_BYTES * models.image[0] * models.image[1] * count


def _rollout(config: Config, models: Models) -> list[Work] | None:
    """Every call goes to one member of the pool with all its prompts."""
    cost, vae = cost_of(specs.rollout(config, models)), cost_of(specs.vae(config, models))
    if cost is None or vae is None:
        return None
    forward, preference = cost.uses["forward"], config.preference
    prompts, samples = preference.batch, preference.batch * preference.candidates
    index = (config.high_noise_steps - 1) / 2  # the mean step that candidates are drawn at
    rollouts, workers = updates(config) + probes(config), config.placement.rollout.workers
    flops = rollouts * (index + 1) * forward.flops(prompts)
    peak = forward.peak(prompts)
    works = [_pool_texts(config, models, "rollout", rollouts / workers * prompts)]
    with_images = rollouts if config.needs_images else probes(config)
    if with_images:
        hops = 1.0 if preference.candidate_image == "one_step" else len(config.sampling.timesteps) - 1 - index
        flops += with_images * hops * forward.flops(samples)
        peak = forward.peak(samples)
        decode, at_once = vae.uses["decode"], min(samples, preference.decode_batch)
        decoded = _pixels(models, samples) / FLOAT + decode.peak(at_once)  # of those before, bytes are kept
        works.append(Work("VAE", "rollout", with_images / workers * decode.flops(samples), decoded))
    proof = forward.flops(1) / preference.every  # with every new version, on every worker
    return [Work("rollout", "rollout", flops / workers + proof, peak), *works]


def _pool_texts(config: Config, models: Models, group: str, prompts: float) -> Work:
    """In one process the learner has encoded them, or will."""
    return _texts(config, models, group, 0 if config.runtime == "local" else prompts)


def _reward_pool(config: Config, models: Models, pool: str) -> list[Work] | None:
    preference = config.preference
    share = (updates(config) + probes(config)) / config.placement.of(pool).workers
    samples = preference.batch * preference.candidates
    at_once = ceil(preference.batch / config.placement.chunks(pool, preference.batch)) * preference.candidates
    works, rewards = [], config.reward_pools[pool]
    for reward in rewards:
        if reward.entry.path_is == "class":
            continue  # nothing is known of it, and the plan says so
        model, calls = models.rewards[reward.label], 1
        if reward.reads_images:
            use = reward_use(reward.kind, model, models.image)
        else:
            calls = 2 if brings_text(model) else 1  # LPO's guidance
            cost = cost_of(specs.latent_reward(config, models, reward.label))
            use = None if cost is None else cost.uses["forward"]
        if use is None:
            return None
        images = _pixels(models, at_once) if reward.reads_images else 0.0
        flops, peak = calls * share * use.flops(samples), use.peak(min(at_once, reward.batch))
        works.append(Work(f"reward: {reward.label}", pool, flops, images + peak))
    if reads_texts(models, rewards):
        works.append(_pool_texts(config, models, pool, share * preference.batch))
    return works
