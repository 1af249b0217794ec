"""Pictures drawn by the roles that hold the networks: those of the plain samplers, and training does not notice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashdmd_ray.batch import Prompts
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.engine.state import under
from flashdmd_ray.results.sample_grid import equal_shards
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.image_sampling import sample_all_images, student_sampler, teacher_sampler
from flashdmd_ray.roles.networks import load_family, student_network
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from tests.levels import levels
from tests.tiny import save_sdxl

TEXTS = ("a red 4", "two 7s", "a blue 1")
TIMESTEPS = (999, 499)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(save_sdxl(tmp_path_factory.mktemp("teacher")))


def settings(teacher: str, ema: float, lora: object) -> Config:
    tree = {
        "model": {"teacher": teacher},
        "lora": lora,
        "generator": {"warmup": 0},
        "evaluation": {"ema": ema, "batch": 2},
    }
    return parse_config(tree)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts(TEXTS, torch.tensor([4, 0, 7]))


@pytest.mark.parametrize("lora", [{}, {"networks": ["generator", "score"], "rank": 4}], ids=["whole", "lora"])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_generator_draws_what_is_judged_and_goes_on_as_it_was(teacher, prompts, ema, lora):
    config = settings(teacher, ema, lora)
    generator = Generator.from_config(config)
    for seed in range(3):
        generator.generate(prompts, levels(prompts, 1), seed=seed)
        generator.distillation_step(torch.ones(3, 4, 8, 8), torch.ones(3, 4, 8, 8))
        if ema:
            generator.update_ema()
    before = generator.weights()
    judged = dict(before)
    if generator.average is not None:
        judged |= under(dict(generator.average.state_items()), "weights/")
    assert (ema > 0) == any(not torch.equal(before[name], judged[name]) for name in before)

    drawn = generator.generate_images(prompts, TIMESTEPS, seed=5)
    family = load_family(config.model)
    student = student_sampler("student", family, student_network(config, family, judged), TIMESTEPS)
    assert torch.equal(drawn, sample_all_images(family, student, TEXTS, [4, 0, 7], 5, batch=2))
    assert drawn.shape == (3, 3, 16, 16)
    assert drawn.abs().max() <= 1
    after = generator.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_teacher_is_drawn_from_the_same_noise(teacher, prompts):
    config = settings(teacher, 0.0, {})
    drawn = ScoreEstimator.from_config(config).generate_teacher_images(prompts, steps=3, guidance_scale=2.0, seed=5)
    family = load_family(config.model)
    sampler = teacher_sampler(family, 3, 2.0)
    assert torch.equal(drawn, sample_all_images(family, sampler, TEXTS, [4, 0, 7], 5, batch=2))


@given(st.lists(st.text(max_size=3), min_size=1, max_size=12), st.integers(1, 20))
def test_every_rank_gets_equally_many_prompts(texts, ranks):
    prompts = equal_shards(texts, ranks)
    shards = prompts.split(ranks)
    assert len({len(shard) for shard in shards}) == 1
    assert len(prompts) < len(texts) + ranks
    assert prompts.texts[: len(texts)] == tuple(texts)
    assert prompts.indices.tolist() == list(range(len(prompts)))
