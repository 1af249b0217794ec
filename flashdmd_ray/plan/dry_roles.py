"""The real role classes of a dry step, on stand-ins for their networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flashdmd_ray.config import Config, EngineConfig, OptimizerConfig
from flashdmd_ray.engine.torch_engine import TorchEngine
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.plan import specs
from flashdmd_ray.plan.clip import reward_use, text_flops
from flashdmd_ray.plan.costs import Cost, Use, cost_of
from flashdmd_ray.plan.measure.networks import blank_conditioning
from flashdmd_ray.plan.models import Models
from flashdmd_ray.plan.parts import teacher_parts
from flashdmd_ray.plan.stand_ins import (
    META,
    Priced,
    PricedDenoiser,
    PricedFamily,
    PricedImages,
    PricedJudge,
    PricedLatentReward,
    PricedReward,
    PricedTowers,
    Spend,
)
from flashdmd_ray.roles.discriminator import Discriminator
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.latent_adversary import AdversarialScoreEstimator, DenoiserWithHead, LatentDiscriminator
from flashdmd_ray.roles.reward import Reward
from flashdmd_ray.roles.rollout import LiveRollout
from flashdmd_ray.roles.score_estimator import ScoreEstimator

Roles = dict[str, dict[str, Any]]
"""Worker group -> name of the role -> the role; a pool's rewards are called "rewards/<pool>"."""


@dataclass(frozen=True)
class Prices:
    """Prices of a configuration's networks, and the sizes of what passes between them. judge: None without a pixel discriminator."""

    teacher: Cost
    generator: Cost
    score: Cost
    vae: Cost
    judge: Cost | None
    rollout: Cost
    rewards: Mapping[str, Use | None]
    latent: tuple[int, int, int]
    image: tuple[int, int]
    spec: specs.Spec
    """Of the teacher."""


def prices_of(config: Config, models: Models) -> Prices | None:
    """None when an architecture is unknown. Measures those that are not in the table."""
    spec = specs.teacher(config, models)
    if spec is None or models.latent is None or models.image is None:
        return None
    costs = [
        cost_of(spec),
        cost_of(specs.trained(config, models, "generator")),
        cost_of(specs.trained(config, models, "score")),
        cost_of(specs.vae(config, models)),
        cost_of(specs.rollout(config, models)),
    ]
    judge = None if models.sam is None else cost_of(specs.judge(config, models))
    known = [cost for cost in costs if cost is not None]
    rewards = {reward.label: _reward_use(config, models, reward.label) for reward in config.rewards if models.rewards}
    custom = {reward.label for reward in config.rewards if reward.entry.path_is == "class"}
    unknown = [label for label, use in rewards.items() if use is None and label not in custom]
    if len(known) < len(costs) or (models.sam is not None and judge is None) or unknown:
        return None
    teacher, generator, score, vae, rollout = known
    return Prices(
        *(teacher, generator, score, vae, judge, rollout, rewards),
        *(models.latent, models.image, spec),
    )


def _reward_use(config: Config, models: Models, label: str) -> Use | None:
    (reward,) = [each for each in config.rewards if each.label == label]
    if reward.entry.path_is == "class":
        return None
    if reward.reads_images:
        return reward_use(reward.kind, models.rewards[label], models.image)
    if reward.entry.reads_estimates:  # the tower; the stem is little beside the teacher's forward
        return reward_use(reward.kind, models.rewards[label], models.latent[1:] if models.latent else None)
    cost = cost_of(specs.latent_reward(config, models, label))
    return None if cost is None else cost.uses["forward"]


class DryEngine(TorchEngine):
    """The real engine over a stand-in's one parameter; it tells of each update."""

    def __init__(
        self,
        module: torch.nn.Module,
        settings: OptimizerConfig,
        accumulation: int,
        role: str,
        updated: Callable[[], None],
    ) -> None:
        super().__init__(module, settings, EngineConfig(accumulation=accumulation), role, None)
        self._updated = updated

    def update(self, *args: Any, **kwargs: Any) -> float:
        self._updated()
        return super().update(*args, **kwargs)


def build_roles(
    config: Config, models: Models, prices: Prices, spend: Spend, updated: Callable[[float], None]
) -> Roles:
    """The roles of one rank of each group."""
    family = partial(_family, config, models, prices, spend)
    learner = family(True)
    precision = config.engine.precision

    def engine(role: str, cost: Cost, settings: OptimizerConfig, head: bool = False) -> DryEngine:
        denoiser = PricedDenoiser(role, precision, cost, spend, True, _mid(prices))
        told = partial(updated, float(cost.trained))
        if not head:
            return DryEngine(denoiser, settings, config.engine.micro_batches, role, told)
        network = DenoiserWithHead(denoiser, denoiser.mid_width, config.adversarial.hidden)
        network.head.requires_grad_(False)
        made = DryEngine(network, settings, config.engine.micro_batches, role, told)
        network.head.to(META)  # after the engine, which would fill what it finds there
        return made

    score = engine("score estimator", prices.score, config.score, head=prices.judge is None)
    images = PricedImages(prices.latent, config.data.latents is not None)
    generator = Generator(config, learner, engine("generator", prices.generator, config.generator))  # type: ignore[arg-type]
    roles: Roles = {"learner": {"generator": generator}}
    if prices.judge is None:
        estimator = AdversarialScoreEstimator(config, learner, score)  # type: ignore[arg-type]
        estimator.images = images
        roles["learner"] |= {"score": estimator, "discriminator": LatentDiscriminator(estimator)}
    else:
        roles["learner"]["score"] = ScoreEstimator(config, learner, score)  # type: ignore[arg-type]
        judge = PricedJudge(config.model.dtype, prices.judge, spend, _logits(models, prices))
        parts = config.critic_micro_batches
        plain = DryEngine(judge, config.adversarial.optimizer, parts, "discriminator", partial(updated, 0.0))
        home = learner if config.beside_learner("discriminator") else family(config.adversarial.prompt_projection)
        roles["discriminator"] = {"discriminator": Discriminator(config, home, plain, images)}  # type: ignore[arg-type]
    if config.preference.updates:
        home = learner if config.beside_learner("rollout") else family(True)
        network = PricedDenoiser("rollout", precision, prices.rollout, spend)
        roles["rollout"] = {"rollouts": LiveRollout(config, home, network)}  # type: ignore[arg-type]
        for pool in config.reward_pools:
            home = learner if config.beside_learner(pool) else family(True)
            roles[pool] = {f"rewards/{pool}": _rewards(config, models, prices, pool, home, spend)}
    return roles


def _family(config: Config, models: Models, prices: Prices, spend: Spend, texts: bool) -> PricedFamily:
    frozen = config.model.dtype
    conditioning = partial(_conditioning, prices.spec)
    flops = sum(text_flops(text) for text in models.texts) if texts else 0.0
    return PricedFamily(
        prices.latent,
        prices.image,
        PricedDenoiser("teacher", frozen, prices.teacher, spend, mid=_mid(prices)),
        Priced("VAE", frozen, prices.vae, spend),
        PricedTowers(conditioning, frozen, flops, spend, config.data.embeddings is not None),
        conditioning,
    )


def _conditioning(spec: specs.Spec, count: int) -> Conditioning:
    with META:
        return blank_conditioning(spec, count)


def _mid(prices: Prices) -> tuple[int, int, int]:
    """Channels, height and width of the denoiser's middle."""
    (_, height, width), network = prices.latent, prices.spec["network"]
    if "block_out_channels" not in network:
        patch = network.get("patch_size", 2)
        channels = network.get("num_attention_heads", 18) * network.get("attention_head_dim", 64)
        return channels, height // patch, width // patch
    channels = network["block_out_channels"]
    scale = 2 ** (len(channels) - 1)
    return channels[-1], -(-height // scale), -(-width // scale)


def _logits(models: Models, prices: Prices) -> int:
    sam = models.sam.config if models.sam is not None else None
    assert sam is not None, "a judge is priced by its SAM"
    return len(sam["global_attn_indexes"]) * (max(prices.image) // sam["patch_size"]) ** 2


def _rewards(config: Config, models: Models, prices: Prices, pool: str, family: PricedFamily, spend: Spend) -> Reward:
    rewards = config.reward_pools[pool]
    found: dict[str, Any] = {}
    for reward in rewards:
        use = prices.rewards[reward.label]
        if reward.reads_images:
            found[reward.label] = PricedReward(reward.label, reward.dtype, use, reward.batch, spend)
        else:
            assert use is not None, "a latent reward is priced"
            needed = teacher_parts(reward, models.rewards[reward.label])
            found[reward.label] = PricedLatentReward(reward.label, use, 1 if needed else 2, needed, spend)
    latent = any(not reward.reads_images for reward in rewards)
    return Reward(config.for_pool(pool), found, torch.device("cpu"), family if latent else None)  # type: ignore[arg-type]
