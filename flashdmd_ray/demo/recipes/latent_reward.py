"""Latent reward model of the demo world: the teacher's down and mid blocks, trained on preference pairs at any noise.

The winner of a pair is a real scene, the loser contradicts the caption in one fact or is badly drawn; both are encoded
and noised to the same random timestep with noise of their own, and the loss is the 2-way softmax of their scores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch.nn import functional as F

from flashdmd_ray.demo.recipes.preferences import contradicting_pool, degrade
from flashdmd_ray.demo.recipes.teacher import encode_images, encode_text
from flashdmd_ray.demo.recipes.text import tokenize
from flashdmd_ray.demo.recipes.training import Plan, fit, make_pool
from flashdmd_ray.demo.scenes import CANVAS, Split
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.latent_reward import LatentRewardModel, UNetLatentReward, save_latent_reward

PLAN = Plan(steps=1500, learning_rate=5e-4, warmup=100, ema_decay=0.998, seed=71)
BATCH = 64
_POOL = 24_000
_BADLY_DRAWN_SHARE = 0.35
EVALUATION_TIMESTEPS = (249, 499, 749, 999)


class _Pairs:
    """Encoded winners, contradicting losers and badly drawn losers (N, 3, 12, 12), with the captions' token ids."""

    def __init__(self, teacher: StableDiffusionXLPipeline, count: int, split: Split, seed: int) -> None:
        pool = make_pool(count, split, seed)
        wrong = contradicting_pool(pool, seed, split)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.arange(count).split(2048)
        poor = [degrade(pool.batch(i), pool.batch(i.roll(1)), generator) for i in rows]
        self.good = torch.cat([encode_images(teacher.vae, pool.batch(i)) for i in rows])
        self.wrong = torch.cat([encode_images(teacher.vae, wrong.batch(i)) for i in rows])
        self.poor = torch.cat([encode_images(teacher.vae, part) for part in poor])
        self.ids = tokenize(teacher.tokenizer, pool.captions)
        self.alphas = teacher.scheduler.alphas_cumprod
        self.teacher = teacher

    def scores(
        self,
        model: LatentRewardModel,
        candidates: list[torch.Tensor],
        index: torch.Tensor,
        times: torch.Tensor,
        generator: torch.Generator,
    ) -> list[torch.Tensor]:
        """Scores (B,) of each tensor of clean latents (B, 3, 12, 12) under the captions `index` at noise `times` (B,)."""
        states, pooled = encode_text(self.teacher.text_encoder, self.teacher.text_encoder_2, self.ids[index])
        signal = self.alphas[times].view(-1, 1, 1, 1)
        noisy = [
            signal.sqrt() * clean + (1 - signal).sqrt() * torch.randn(clean.shape, generator=generator)
            for clean in candidates
        ]
        repeat = len(candidates)
        time_ids = torch.tensor([[CANVAS, CANVAS, 0, 0, CANVAS, CANVAS]], dtype=torch.float32)
        scores = model(
            torch.cat(noisy).contiguous(memory_format=torch.channels_last),
            times.repeat(repeat),
            Conditioning(
                states.repeat(repeat, 1, 1), pooled.repeat(repeat, 1), time_ids.expand(repeat * len(index), 6)
            ),
        )
        return list(scores.chunk(repeat))


def train(
    work: Path, teacher: StableDiffusionXLPipeline, plan: Plan = PLAN
) -> tuple[LatentRewardModel, dict[str, float]]:
    """The latent reward and the shares of held-out pairs that it orders right, by kind of loser and timestep."""
    torch.manual_seed(plan.seed)
    model = UNetLatentReward.from_unet(teacher.unet)
    # The down blocks stay the teacher's: their weights need not be shipped twice.
    model.requires_grad_(False)
    for trained in (model.unet.mid_block, model.visual_projection):
        trained.requires_grad_(True)
    model.logit_scale.requires_grad_(True)
    model = model.to(memory_format=torch.channels_last)
    pairs = _Pairs(teacher, _POOL, "train", plan.seed)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(_POOL, (BATCH,), generator=generator)
        times = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (1000 / BATCH)).long()
        badly = torch.rand(BATCH, 1, 1, 1, generator=generator) < _BADLY_DRAWN_SHARE
        loser = torch.where(badly, pairs.poor[index], pairs.wrong[index])
        best, worst = pairs.scores(model, [pairs.good[index], loser], index, times, generator)
        return F.softplus(worst - best).mean()

    seconds = fit("latent_reward", model, loss_of, plan, work)
    return model.eval(), {"seconds": seconds, **evaluate(model.eval(), teacher)}


@torch.no_grad()
def evaluate(model: LatentRewardModel, teacher: StableDiffusionXLPipeline, count: int = 1500) -> dict[str, float]:
    """Shares of held-out pairs in which the real scene scores higher, at several timesteps."""
    pairs = _Pairs(teacher, count, "held_out", 7272)
    generator = torch.Generator().manual_seed(7272)
    result: dict[str, float] = {"count": count}
    for time in EVALUATION_TIMESTEPS:
        wins = []
        for index in torch.arange(count).split(250):
            candidates = [pairs.good[index], pairs.wrong[index], pairs.poor[index]]
            good, wrong, poor = pairs.scores(model, candidates, index, torch.full_like(index, time), generator)
            wins.append(torch.stack([good > wrong, good > poor]).float())
        contradicting, badly_drawn = torch.cat(wins, dim=1).mean(dim=1).tolist()
        result[f"t{time}_beats_contradicting"] = contradicting
        result[f"t{time}_beats_badly_drawn"] = badly_drawn
    return result


def save(model: LatentRewardModel, path: Path, teacher: Path) -> None:
    """`teacher`: the shipped teacher's directory, from which the frozen blocks are read at loading."""
    save_latent_reward(model, path, dtype=torch.float16, base=teacher / "unet")
