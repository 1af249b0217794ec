"""The demo's reward on latents: the packaged PickScore's tower behind a stem, trained as the preset `latent_reward_clip_demo` says.

It serves both teachers, which have one VAE.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import RewardConfig, load_as
from flashdmd_ray.demo.scenes import sample_scenes
from flashdmd_ray.diffusion.sampling import backward_simulation, denoise_to_clean, step_distribution, timesteps_like
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards.clip import CosineReward
from flashdmd_ray.models.rewards.latent_clip import LatentClip
from flashdmd_ray.monitor.agreement import agreement
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.local_context import LocalContext
from flashdmd_ray.reward_training.pairs import open_pair_data
from flashdmd_ray.reward_training.prepare import prepare_pairs
from flashdmd_ray.reward_training.stem import StemTrainer
from flashdmd_ray.reward_training.training import train as train_pairs
from flashdmd_ray.roles.networks import load_parts, x0_predictor
from recipes.training import Plan

PLAN = Plan(steps=1200, learning_rate=2e-3, warmup=30, ema_decay=0.99, seed=81)
TIMESTEPS = (999, 749, 499, 249)
CANDIDATES = 4


def settings(teacher: Path, reward: Path, plan: Plan) -> RewardTrainingConfig:
    """The preset with the plan's length."""
    changes = {
        "seed": plan.seed,
        "steps": plan.steps,
        "runtime": "local",
        "model.teacher": teacher,
        "rewards": f"[{{kind: pickscore, path: {reward}}}]",
        "optimizer.lr": plan.learning_rate,
        "optimizer.warmup": plan.warmup,
        "ema": plan.ema_decay,
    }
    return load_as(
        RewardTrainingConfig, "latent_reward_clip_demo", [f"{key}={value}" for key, value in changes.items()]
    )


def train(work: Path, teacher: Path, reward: Path, plan: Plan = PLAN) -> tuple[LatentClip, dict[str, float]]:
    """Train the stem; return the reward, and how it ranks candidates."""
    config, home, began = settings(teacher, reward, plan), work / "latent_clip", time.monotonic()
    family = load_parts(config.model, ("denoiser", "vae", "text"))
    source = prepare_pairs(config, home / "pairs", lambda: family, print)
    pairs = open_pair_data(config.pairs, source, family.image_size, config.seed).train
    trainer = StemTrainer.from_config(config, family)
    train_pairs(trainer, pairs, LocalContext(home / "checkpoints"), _note)
    model, masters = trainer.result()
    assert isinstance(model, LatentClip)
    model.load_state_dict(masters, strict=False)
    return model.eval(), {"seconds": time.monotonic() - began, **evaluate(model.eval(), family, model.judge)}


def _note(step: int, metrics: Metrics) -> None:
    if step % 50 == 0:
        print(f"latent_clip: step {step} loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.3f}", flush=True)


@torch.no_grad()
def evaluate(
    model: LatentClip, family: Family, judge: CosineReward, count: int = 384, completions: int = 4
) -> dict[str, float]:
    """Agreement within groups of candidates at both high-noise steps of the generator that a run starts from, on held-out prompts.

    The reference is the judge's mean reward of `completions` images with other later noise, or of the one-step image if 0. Beside the
    model: the judge on the one-step image, which is the most that can be had without completing.
    """
    texts = [scene.caption for scene in sample_scenes(count, "held_out", 8181)]
    found: dict[str, float] = {"count": count}
    for step in (0, 1):
        columns: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, count, 32):
            some = texts[start : start + 32]
            generator = torch.Generator().manual_seed(8181 + 1000 * step + start)
            noisy, one_step, finals = _candidates(family, some, step, completions, generator)
            groups = [text for text in some for _ in range(CANDIDATES)]
            timesteps = timesteps_like(TIMESTEPS[step + 1], noisy)
            seen = [judge.score(family.decode(images).clamp(-1, 1), groups) for images in (one_step, *finals)]
            rewards = (
                model.score(noisy, timesteps, groups, family),
                seen[0],
                torch.stack(seen[1:] or seen).mean(dim=0),
            )
            columns.append(tuple(reward.view(-1, CANDIDATES) for reward in rewards))  # type: ignore[arg-type]
        own, one, completed = (torch.cat(column) for column in zip(*columns, strict=True))
        for name, values in (("", own), ("_one_step_image", one)):
            both = agreement(values, completed)
            assert both is not None, "candidates without a difference"
            found[f"t{TIMESTEPS[step + 1]}{name}_correlation"] = both.correlation
            found[f"t{TIMESTEPS[step + 1]}{name}_best_beats_worst"] = both.best_beats_worst
    return found


def _candidates(
    family: Family, texts: list[str], step: int, completions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Candidates renoised after denoising step `step`, their one-step latents and latents of completions; groups in a row."""

    def noise(groups: int = len(texts)) -> Tensor:
        return torch.randn(groups, *family.latent_shape, generator=generator)

    def same_in_group(_: int) -> Tensor:
        return noise().repeat_interleave(CANDIDATES, 0)

    conditioning = family.encode(texts)
    predict = x0_predictor(family.teacher, family.schedule, conditioning)
    noisy = backward_simulation(predict, family.schedule, TIMESTEPS, step, lambda _: noise())
    mean, std = step_distribution(
        family.schedule, predict(noisy, timesteps_like(TIMESTEPS[step], noisy)), TIMESTEPS[step + 1]
    )
    values = mean.repeat_interleave(CANDIDATES, 0) + std * noise(len(texts) * CANDIDATES)
    predict = x0_predictor(family.teacher, family.schedule, conditioning.repeat_interleave(CANDIDATES))
    clean = predict(values, timesteps_like(TIMESTEPS[step + 1], values))
    finals = [
        denoise_to_clean(predict, family.schedule, TIMESTEPS, step + 1, clean, same_in_group)
        for _ in range(completions)
    ]
    return values, clean, finals


def save(model: LatentClip, path: Path) -> None:
    """Save the stem in half precision. The judge is the packaged reward."""
    model.stem.half()
    model.save(path, RewardConfig(kind="pickscore", path="demo"), {"scaling_factor": 1.0, "shift_factor": 0.0})
