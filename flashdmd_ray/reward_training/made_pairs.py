"""Pairs of images that are made here: digit scenes against wrong ones, and what the teacher or a student draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.models.family import Family
from flashdmd_ray.reward_training.check import find_drawing_student
from flashdmd_ray.reward_training.config import PairsConfig, RewardTrainingConfig
from flashdmd_ray.reward_training.pairs import HELD_OUT, TRAIN, Pairs
from flashdmd_ray.roles.image_sampling import Sampler, sample_all_images, student_sampler, teacher_sampler

BADLY_DRAWN_SHARE = 0.35
HELD_OUT_SCENES = 2000

Make = Callable[[int, int], Pairs]
"""make(start, count): that many pairs from number `start` on; equal on every call."""


def demo_pairs(split: str, seed: int) -> Make:
    """Real scenes of a split, each beside one that contradicts its caption in one fact, or beside itself badly drawn; in random order."""
    from flashdmd_ray.demo.flawed_scenes import contradicting_pool, degrade
    from flashdmd_ray.demo.scenes import make_pool

    side = "train" if split == TRAIN else HELD_OUT

    def make(start: int, count: int) -> Pairs:
        own = derive_seed(seed, "pairs", split, start) % 2**31
        generator = torch.Generator().manual_seed(own)
        pool = make_pool(count, side, own)  # type: ignore[arg-type]
        wrong = contradicting_pool(pool, own, side)  # type: ignore[arg-type]
        rows = torch.arange(count)
        good = pool.batch(rows)
        badly = torch.rand(count, 1, 1, 1, generator=generator) < BADLY_DRAWN_SHARE
        loser = torch.where(badly, degrade(good, good.roll(1, 0), generator), wrong.batch(rows))
        first = torch.rand(count, generator=generator) < 0.5
        images = torch.stack([good, loser], dim=1)
        images = torch.where(first.view(-1, 1, 1, 1, 1), images, images.flip(1))
        return Pairs(images, tuple(pool.captions), first.float(), first.float())

    return make


def drawn_pairs(config: RewardTrainingConfig, family: Family) -> Make:
    """Two images for each prompt in turn, of noise of their own, by the teacher or by a run's student. Nobody has judged them: NaN.

    Raises ValueError when the prompts or the student are not there.
    """
    texts = _prompts(config.pairs, config.seed)
    samplers = (
        [_student_sampler(config.pairs, family)]
        if config.pairs.source == "student"
        else [teacher_sampler(family, steps, config.pairs.guidance_scale) for steps in config.pairs.drawing_steps]
    )

    def make(start: int, count: int) -> Pairs:
        numbers = range(start, start + count)
        prompts = [texts[number % len(texts)] for number in numbers]
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "pairs/sampler", start))
        chosen = torch.randint(len(samplers), (count, 2), generator=generator)
        images: Tensor = torch.zeros(count, 2, 3, *family.image_size)
        for which, sampler in enumerate(samplers):
            for image in range(2):
                rows = (chosen[:, image] == which).nonzero()[:, 0].tolist()
                if rows:
                    indices = [2 * (start + row) + image for row in rows]
                    drawn = sample_all_images(family, sampler, [prompts[row] for row in rows], indices, config.seed, 64)
                    images[rows, image] = drawn
        unknown = torch.full((count,), torch.nan)
        return Pairs(images, tuple(prompts), unknown, unknown)

    return make


def _prompts(config: PairsConfig, seed: int) -> tuple[str, ...]:
    if config.prompts is None:
        from flashdmd_ray.demo.scenes import sample_scenes

        return tuple(
            scene.caption for scene in sample_scenes(config.count, "train", derive_seed(seed, "prompts") % 2**31)
        )
    from flashdmd_ray.data.formats import Columns, open_prompts
    from flashdmd_ray.data.index import default_cache, open_index

    index = open_index(open_prompts(config.prompts, Columns(), "pairs.prompts"), config.cache or default_cache())
    index.tally.check(config.max_bad_fraction, f"pairs.prompts {config.prompts}", "pairs.max_bad_fraction")
    return index.captions(range(len(index)))


def _student_sampler(config: PairsConfig, family: Family) -> Sampler:
    from flashdmd_ray.results.student import read_student
    from flashdmd_ray.roles.networks import load_student

    run, source = find_drawing_student(config, family.name)
    student = load_student(family, read_student(source, run, family))
    return student_sampler("student", family, student, run.sampling.timesteps)
