"""The learner's two roles on a small random SDXL: who moves whom, and that no gradient strays."""

import math

import pytest
import torch

from flashdmd_ray.batch import Latents, PreferencePairs, Prompts, noise
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from tests.levels import levels
from tests.tiny import save_sdxl

TEXTS = ("a red 4", "two 7s", "a blue 1")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    teacher = save_sdxl(tmp_path_factory.mktemp("teacher"))
    return parse_config({"model": {"teacher": str(teacher)}, "generator": {"warmup": 0}, "preference": {"warmup": 0}})


@pytest.fixture
def generator(config) -> Generator:
    return Generator.from_config(config)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts(TEXTS, torch.arange(len(TEXTS)))


def gradient_of(generator: Generator, matching: torch.Tensor, realism: torch.Tensor) -> torch.Tensor:
    """What `update` would hand to the optimizer."""
    high_noise, low_noise = generator._outputs
    parameters = [p for p in generator.engine.module.parameters() if p.requires_grad]
    loss = ((high_noise * matching).sum() + (low_noise * realism).sum()) / len(high_noise)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_no_objective_reaches_the_other_forward(generator, prompts):
    """The coarse output enters the fine forward detached, so the two gradients are those of two separate losses."""
    prediction = generator.generate(prompts, levels(prompts, 1), seed=7)
    high_noise, low_noise = generator._outputs
    assert prediction.high_noise.values.requires_grad is False
    assert not torch.equal(high_noise, low_noise)
    (reached,) = torch.autograd.grad(low_noise.sum(), high_noise, allow_unused=True, retain_graph=True)
    assert reached is None
    (reached,) = torch.autograd.grad(high_noise.sum(), low_noise, allow_unused=True, retain_graph=True)
    assert reached is None


def test_update_applies_the_sum_of_both_gradients(generator, prompts):
    generator.generate(prompts, levels(prompts, 0), seed=7)
    matching, realism = (torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    zero = torch.zeros_like(matching)
    parts = gradient_of(generator, matching, zero) + gradient_of(generator, zero, realism)
    expected_norm = parts.norm().item()
    before = generator.engine.weights()
    metrics = generator.distillation_step(matching, realism)
    assert metrics["generator/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)
    moved = [name for name, value in generator.weights().items() if not torch.equal(value, before[name])]
    assert len(moved) > len(before) // 2


def test_sample_repeats_predict_without_a_graph(generator, prompts):
    one = generator.generate(prompts, levels(prompts, 2), seed=3)
    two = generator.sample_fakes(prompts, levels(prompts, 2), seed=3)
    torch.testing.assert_close(one.high_noise.values, two.high_noise.values)
    torch.testing.assert_close(one.low_noise.values, two.low_noise.values)
    other = generator.sample_fakes(prompts, levels(prompts, 2), seed=4)
    assert not torch.allclose(one.high_noise.values, other.high_noise.values)


def test_shared_routing_uses_one_forward(generator, prompts):
    prediction = generator.generate(prompts, levels(prompts, 3, None), seed=3)
    assert torch.equal(prediction.high_noise.values, prediction.low_noise.values)


def test_the_numbers_of_a_sample_do_not_depend_on_its_shard(generator, prompts):
    whole = generator.sample_fakes(prompts, levels(prompts, 2), seed=3)
    shards = [generator.sample_fakes(shard, levels(shard, 2), seed=3) for shard in prompts.split(3)]
    joined = type(whole).concat(shards)
    torch.testing.assert_close(joined.low_noise.values, whole.low_noise.values, atol=1e-4, rtol=1e-4)


def test_score_gradient_vanishes_when_the_estimator_is_the_guided_teacher(config, prompts):
    """At the start psi = teacher, so without guidance x_real = x_fake and there is nothing to match."""
    unguided = config.model_copy(update={"matching": config.matching.model_copy(update={"guidance_scale": 1.0})})
    latents = Latents(noise(prompts.indices, (4, 8, 8), 5, "x"), prompts)
    timesteps = torch.tensor([50, 400, 900])
    gradient, metrics = ScoreEstimator.from_config(unguided).dm_gradient(latents, timesteps, seed=1)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert metrics["matching/real_fake_gap"] == 0
    guided, _ = ScoreEstimator.from_config(config).dm_gradient(latents, timesteps, seed=1)
    assert guided.abs().sum() > 0


def test_coupling_moves_the_estimator_towards_the_generator(config, generator, prompts):
    score = ScoreEstimator.from_config(config)
    start = score.engine.weights()
    generator.generate(prompts, levels(prompts, 0), seed=7)
    generator.distillation_step(torch.ones(3, 4, 8, 8), torch.zeros(3, 4, 8, 8))
    target = generator.weights()
    for _ in range(3):
        score.ema_update_from(generator, 0.9)
    for name, value in score.engine.weights().items():
        torch.testing.assert_close(value, 0.9**3 * start[name] + (1 - 0.9**3) * target[name])


def test_score_update_lowers_its_denoising_loss(config, prompts):
    score = ScoreEstimator.from_config(
        config.model_copy(update={"score": config.score.model_copy(update={"warmup": 0})})
    )
    fakes = Latents(noise(prompts.indices, (4, 8, 8), 5, "fakes"), prompts)
    reals = torch.arange(3)
    losses = [score.denoising_step(fakes, torch.tensor([100, 500, 900]), 3, reals)["score/loss"] for _ in range(20)]
    assert losses[-1] < losses[0]


def preference_pairs(prompts: Prompts, weights: torch.Tensor) -> PreferencePairs:
    draw = {name: noise(prompts.indices, (4, 8, 8), 1, name) for name in ("noisy", "winners", "losers")}
    return PreferencePairs(
        prompts=prompts, **draw, weights=weights, margins=torch.ones(3), timestep=999, next_timestep=749, version=0
    )


def test_preference_loss_starts_at_log_two_and_falls(config, generator, prompts):
    generator.freeze_reference()
    pairs = preference_pairs(prompts, torch.ones(3))
    first = generator.preference_step(pairs)
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["preference/beta_h"] == 0
    assert first["preference/drift"] == 0
    for _ in range(5):
        last = generator.preference_step(pairs)
    assert last["preference/loss"] < first["preference/loss"]
    assert last["preference/implicit_accuracy"] == 1
    assert last["preference/drift"] > 0
    assert last["preference/beta_h"] > 0


def test_a_quarter_of_the_rate_moves_the_weights_a_quarter_as_far(config, prompts):
    """The hack monitor's lower rate: AdamW's step is linear in the rate, and not in the loss."""
    moved = []
    for rate in (1.0, 0.25):
        generator = Generator.from_config(config)
        generator.freeze_reference()
        start = generator.engine.weights()
        generator.preference_step(preference_pairs(prompts, torch.ones(3)), rate)
        moved.append(torch.cat([(end - start[name]).flatten() for name, end in generator.weights().items()]))
    assert moved[0].norm() > 0
    assert (moved[1].norm() / moved[0].norm()).item() == pytest.approx(0.25, rel=0.01)


def test_each_objective_of_the_generator_has_a_rate_of_its_own(config, prompts):
    """The preference rate is 0 from its first update on; distillation goes on."""
    at_rest = config.preference.model_copy(update={"decay": 1})
    generator = Generator.from_config(config.model_copy(update={"preference": at_rest}))
    generator.freeze_reference()
    before = generator.engine.weights()
    generator.preference_step(preference_pairs(prompts, torch.ones(3)))
    assert all(torch.equal(value, before[name]) for name, value in generator.weights().items())
    prediction = generator.generate(prompts, levels(prompts, 0), seed=7)
    generator.distillation_step(
        torch.ones_like(prediction.high_noise.values), torch.ones_like(prediction.low_noise.values)
    )
    assert any(not torch.equal(value, before[name]) for name, value in generator.weights().items())


def test_dropped_pairs_teach_nothing(config, prompts):
    """Whatever a dropped pair holds, the update is that of the kept ones."""
    updated = []
    for rubbish in (1.0, 1e6):
        generator = Generator.from_config(config)
        generator.freeze_reference()
        pairs = preference_pairs(prompts, torch.tensor([3.0, 0.0, 0.0]))
        pairs.winners[1:] = rubbish
        generator.preference_step(pairs)
        updated.append(generator.weights())
    assert all(torch.equal(value, updated[1][name]) for name, value in updated[0].items())


def test_save_and_load_continue_bit_for_bit(config, prompts, tmp_path):
    def steps(generator: Generator, score: ScoreEstimator, seeds: range) -> None:
        for seed in seeds:
            prediction = generator.generate(prompts, levels(prompts, seed % 3), seed=seed)
            gradient, _ = score.dm_gradient(prediction.high_noise, torch.tensor([50, 400, 900]), seed)
            generator.distillation_step(gradient, torch.full_like(gradient, 1e-3))
            score.ema_update_from(generator, 0.98)
            score.denoising_step(prediction.high_noise, torch.tensor([5, 300, 990]), seed, torch.arange(3))
            generator.preference_step(preference_pairs(prompts, torch.ones(3)))

    straight, resumed = ((Generator.from_config(config), ScoreEstimator.from_config(config)) for _ in range(2))
    straight[0].freeze_reference()
    steps(*straight, range(2))
    for role in straight:
        role.save(tmp_path)
    steps(*straight, range(2, 4))
    for role in resumed:
        role.load(tmp_path)
    steps(*resumed, range(2, 4))
    for one, two in zip(straight, resumed, strict=True):
        expected, found = one.engine.state(), two.engine.state()
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_roles_of_one_process_share_the_frozen_family(config):
    assert load_family(config.model) is load_family(config.model)
    assert Generator.from_config(config).family is ScoreEstimator.from_config(config).family
