"""Latent reward model of the demo world: the teacher's down and mid blocks, trained on preference pairs at any noise.

The better image of a pair is a real scene, the other contradicts the caption in one fact or is badly drawn. The training is that of
jobs/train_latent_reward.py with these settings; each image has noise of its own.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from flashdmd_ray.batch import Metrics
from flashdmd_ray.config import validated
from flashdmd_ray.demo.flawed_scenes import contradicting_pool, degrade
from flashdmd_ray.demo.scenes import make_pool
from flashdmd_ray.diffusion.sampling import timesteps_like
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import LatentRewardModel, save_latent_reward
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.local_context import LocalContext
from flashdmd_ray.reward_training.pairs import open_pair_data
from flashdmd_ray.reward_training.prepare import prepare_pairs
from flashdmd_ray.reward_training.training import RewardTrainer, encode_pairs, noised, pair_rewards
from flashdmd_ray.reward_training.training import train as train_pairs
from flashdmd_ray.roles.networks import load_parts
from recipes.training import Plan

PLAN = Plan(steps=1500, learning_rate=5e-4, warmup=100, ema_decay=0.998, seed=71)
_PAIRS = 24_000
EVALUATION_TIMESTEPS = (249, 499, 749, 999)


def settings(teacher: Path, plan: Plan) -> RewardTrainingConfig:
    """The configuration of the training. The down blocks stay the teacher's: their weights need not be shipped twice."""
    optimizer = {
        "lr": plan.learning_rate,
        "betas": [0.9, 0.99],
        "weight_decay": plan.weight_decay,
        "warmup": plan.warmup,
    }
    tree = {
        "seed": plan.seed,
        "steps": plan.steps,
        "batch": 64,
        "runtime": "local",
        "model": {"family": "sdxl", "teacher": str(teacher)},
        "latent_reward": {"train": "last"},
        "pairs": {"source": "demo", "count": _PAIRS},
        "noise": "own",
        "optimizer": optimizer,
        "ema": plan.ema_decay,
    }
    return validated(RewardTrainingConfig, tree)


def train(work: Path, teacher: Path, plan: Plan = PLAN) -> tuple[LatentRewardModel, dict[str, float]]:
    """Train the latent reward; return it and the shares of held-out pairs that it orders right, by kind of loser and timestep."""
    config, home, began = settings(teacher, plan), work / "latent_reward", time.monotonic()
    family = load_parts(config.model, ("vae", "text"))
    source = prepare_pairs(config, home / "pairs", lambda: family, print)
    pairs = open_pair_data(config.pairs, source, family.image_size, config.seed).train
    trainer = RewardTrainer.from_config(config, family)
    train_pairs(trainer, pairs, LocalContext(home / "checkpoints"), _note)
    model, masters = trainer.result()
    assert isinstance(model, LatentRewardModel)
    model.load_state_dict(masters, strict=False)
    return model.eval(), {"seconds": time.monotonic() - began, **evaluate(model.eval(), family)}


def _note(step: int, metrics: Metrics) -> None:
    if step % 50 == 0:
        print(f"latent_reward: step {step} loss {metrics['loss']:.4f}", flush=True)


@torch.no_grad()
def evaluate(model: LatentRewardModel, family: Family, count: int = 1500) -> dict[str, float]:
    """Shares of held-out pairs in which the real scene scores higher, at several timesteps, each image with noise of its own."""
    pool = make_pool(count, "held_out", 7272)
    wrong = contradicting_pool(pool, 7272, "held_out")
    generator = torch.Generator().manual_seed(7272)
    wins: dict[str, list[torch.Tensor]] = {}
    for rows in torch.arange(count).split(250):
        good, texts = pool.batch(rows), [pool.captions[row] for row in rows.tolist()]
        losers = {"contradicting": wrong.batch(rows), "badly_drawn": degrade(good, good.roll(1, 0), generator)}
        for kind, loser in losers.items():
            clean = encode_pairs(family, torch.stack([good, loser], dim=1))
            for time_step in EVALUATION_TIMESTEPS:
                times = timesteps_like(time_step, clean)
                noisy = noised(family, clean, times, rows, 7272 + time_step, "own")
                rewards = pair_rewards(family, model, noisy, times, texts)
                wins.setdefault(f"t{time_step}_beats_{kind}", []).append(rewards[:, 0] > rewards[:, 1])
    return {"count": count} | {name: float(torch.cat(parts).float().mean()) for name, parts in wins.items()}


def save(model: LatentRewardModel, path: Path, teacher: Path) -> None:
    """Save the model. `teacher`: the shipped teacher's directory, from which the frozen blocks are read at loading."""
    save_latent_reward(model, path, dtype=torch.float16, base=teacher / "unet")
