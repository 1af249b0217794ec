"""The learner with LoRA: one base, adapters that train, couple, travel and resume; and the average for evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashdmd_ray.batch import Latents, PreferencePairs, Prompts, PublishedWeights, noise
from flashdmd_ray.checkpoint import load_tensors
from flashdmd_ray.config import Config, load_config, parse_config
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import UNetDenoiser
from flashdmd_ray.roles.generator import AVERAGE, Generator
from flashdmd_ray.roles.latent_adversary import AdversarialScoreEstimator, LatentDiscriminator
from flashdmd_ray.roles.networks import load_family, whole_weights
from flashdmd_ray.roles.rollout import Rollout
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from tests.levels import levels
from tests.tiny import save_sdxl

TEXTS = ("a red 4", "two 7s", "a blue 1")
BOTH = {"networks": ["generator", "score"], "rank": 4, "alpha": 8.0}
Learner = tuple[Generator, ScoreEstimator]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_sdxl(tmp_path_factory.mktemp("teacher"))


def settings(teacher: Path, lora: object = BOTH, **changes: object) -> Config:
    tree = {
        "model": {"teacher": str(teacher)},
        "lora": lora,
        "generator": {"warmup": 0},
        "score": {"warmup": 0},
        "preference": {"warmup": 0},
    }
    return parse_config(tree | changes)


@pytest.fixture(scope="module")
def config(teacher) -> Config:
    return settings(teacher)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts(TEXTS, torch.arange(len(TEXTS)))


def learner(config: Config) -> Learner:
    return Generator.from_config(config), ScoreEstimator.from_config(config)


def pairs(prompts: Prompts) -> PreferencePairs:
    draw = {name: noise(prompts.indices, (4, 8, 8), 1, name) for name in ("noisy", "winners", "losers")}
    ones = torch.ones(len(prompts))
    return PreferencePairs(
        prompts=prompts, **draw, weights=ones, margins=ones, timestep=999, next_timestep=749, version=0
    )


def train(roles: Learner, prompts: Prompts, seeds: range) -> None:
    """Steps as the driver makes them: distillation, coupling, the score estimator, a preference update."""
    generator, score = roles
    for seed in seeds:
        prediction = generator.generate(prompts, levels(prompts, seed % 3), seed=seed)
        gradient, _ = score.dm_gradient(prediction.high_noise, torch.tensor([50, 400, 900]), seed)
        generator.distillation_step(gradient, torch.full_like(gradient, 1e-3))
        score.ema_update_from(generator, score.config.score.ema)
        score.denoising_step(prediction.high_noise, torch.tensor([5, 300, 990]), seed, torch.arange(3))
        if generator.reference is not None:
            generator.preference_step(pairs(prompts))
        if generator.average is not None:
            generator.update_ema()


def averaged(generator: Generator) -> dict[str, torch.Tensor]:
    """The average of its weights, by parameter name."""
    assert generator.average is not None
    return {name.removeprefix("weights/"): t for name, t in generator.average.state_items() if name != "updates"}


def storages(*modules: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for m in modules for p in (*m.parameters(), *m.buffers())}


def inside(network: torch.nn.Module | None) -> torch.nn.Module:
    """All that a network computes with, the base included."""
    assert isinstance(network, AdaptedDenoiser)
    return network._adapted[0]


def test_four_networks_have_the_memory_of_one(config, prompts):
    roles = generator, score = learner(config)
    generator.freeze_reference()
    train(roles, prompts, range(1))
    teacher = generator.family.teacher
    networks = [inside(n) for n in (generator.engine.module, score.engine.module, generator.reference)]
    adapters = storages(generator.engine.module, score.engine.module, generator.reference)
    assert storages(teacher, *networks) == storages(teacher) | adapters
    assert storages(teacher).isdisjoint(adapters)
    own = sum(p.numel() for p in generator.engine.module.parameters())
    assert own < 0.2 * sum(p.numel() for p in teacher.parameters())


def test_training_moves_the_adapters_and_never_the_teacher(config, prompts):
    roles = generator, score = learner(config)
    teacher = generator.family.teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert all(torch.equal(value, score.engine.weights()[name]) for name, value in generator.weights().items())
    start = generator.weights()
    generator.freeze_reference()
    train(roles, prompts, range(2))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [name for name, value in generator.weights().items() if torch.equal(value, start[name])] == []
    assert all(torch.equal(value, start[name]) for name, value in generator.reference.state_dict().items())


def test_score_gradient_starts_at_zero_without_guidance(teacher, prompts):
    """Teacher and score estimator compute with the same tensors: to the bit, before training."""
    config = settings(teacher, matching={"guidance_scale": 1.0})
    latents = Latents(noise(prompts.indices, (4, 8, 8), 5, "x"), prompts)
    gradient, _ = ScoreEstimator.from_config(config).dm_gradient(latents, torch.tensor([50, 400, 900]), seed=1)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_coupling_moves_the_adapters(config, prompts):
    generator, score = learner(config)
    start = score.engine.weights()
    generator.generate(prompts, levels(prompts, 0), seed=7)
    generator.distillation_step(torch.ones(3, 4, 8, 8), torch.zeros(3, 4, 8, 8))
    target = generator.weights()
    score.ema_update_from(generator, 0.9)
    for name, value in score.engine.weights().items():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * target[name])


def test_rollouts_receive_the_adapter_and_draw_the_generator_s_samples(config, prompts):
    roles = generator, _ = learner(config)
    train(roles, prompts, range(2))
    tensors = generator.weights()
    assert all(".lora_" in name for name in tensors)
    rollout = Rollout.from_config(config)
    published = PublishedWeights(version=2, tensors=tensors, key="2")
    rollout.candidates(prompts, 0, seed=3, weights=published)
    assert storages(inside(rollout.network)) == storages(rollout.family.teacher) | storages(rollout.network)
    inputs = noise(prompts.indices, (4, 8, 8), 1, "x"), torch.tensor([9, 500, 999]), generator.family.encode(TEXTS)
    with torch.no_grad():
        assert torch.equal(rollout.network(*inputs), generator.engine.module(*inputs))
        assert not torch.equal(rollout.network(*inputs), generator.family.teacher(*inputs))


def test_whole_weights_are_a_network_without_adapters(config, prompts):
    roles = generator, _ = learner(config)
    train(roles, prompts, range(2))
    family = generator.family
    merged = family.denoiser()
    assert isinstance(merged, UNetDenoiser)
    merged.load_state_dict(whole_weights(config, family, generator.weights()))
    inputs = noise(prompts.indices, (4, 8, 8), 1, "x"), torch.tensor([9, 500, 999]), family.encode(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(merged(*inputs), generator.engine.module(*inputs), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="do not fit the generator of this configuration"):
        whole_weights(config, family, merged.state_dict())


@pytest.mark.parametrize("engine", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_save_and_load_continue_bit_for_bit(teacher, prompts, tmp_path, engine):
    config = settings(teacher, engine=engine, evaluation={"ema": 0.9})
    straight, resumed = learner(config), learner(config)
    straight[0].freeze_reference()
    train(straight, prompts, range(2))
    for role in straight:
        role.save(tmp_path)
    train(straight, prompts, range(2, 4))
    for role in resumed:
        role.load(tmp_path)
    train(resumed, prompts, range(2, 4))
    for one, two in zip(straight, resumed, strict=True):
        expected, found = one.engine.state(), two.engine.state()
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    expected, found = (averaged(roles[0]) for roles in (straight, resumed))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    saved = {path.name: load_tensors(path) for path in tmp_path.iterdir()}
    assert set(saved) == {"generator.safetensors", AVERAGE, "reference.safetensors", "score_estimator.safetensors"}
    assert all(".lora_" in name for part in saved.values() for name in part if not name.startswith("updates"))


@pytest.mark.parametrize("network", ["generator", "score"])
def test_one_network_as_lora_beside_a_whole_one(teacher, prompts, network):
    roles = learner(settings(teacher, {**BOTH, "networks": [network]}, score={"ema": 1.0}))
    train(roles, prompts, range(2))
    adapted = [isinstance(role.engine.module, AdaptedDenoiser) for role in roles]
    assert adapted == [network == "generator", network == "score"]
    assert not any(".lora_" in name for name in roles[adapted.index(False)].engine.weights())


def test_the_latent_adversary_s_head_trains_beside_the_adapter(teacher, prompts):
    config = settings(teacher, score={"ema": 1.0, "warmup": 0}, adversarial={"space": "latent"})
    estimator = AdversarialScoreEstimator.from_config(config)
    names = list(estimator.engine.weights())
    assert {name.split(".")[0] for name in names} == {"denoiser", "head"}
    assert all(".lora_" in name for name in names if name.startswith("denoiser"))
    fakes = Latents(noise(prompts.indices, (4, 8, 8), 5, "fakes"), prompts)
    gradient, _ = LatentDiscriminator(estimator).gan_gradient(fakes, torch.tensor([5, 300, 990]), seed=2)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None or not p.grad.any() for p in estimator.engine.module.parameters())


def test_the_average_is_emamodel_s_of_every_step(teacher, prompts):
    generator = Generator.from_config(settings(teacher, evaluation={"ema": 0.5}))
    start = generator.weights()
    assert all(torch.equal(value, start[name]) for name, value in averaged(generator).items())
    generator.freeze_reference()
    expected = start
    for step in range(1, 5):
        if step % 2:
            generator.generate(prompts, levels(prompts, 0), seed=step)
            generator.distillation_step(torch.ones(3, 4, 8, 8), torch.zeros(3, 4, 8, 8))
        else:
            generator.preference_step(pairs(prompts))
        generator.update_ema()
        kept = 0.0 if step == 1 else min(0.5, step / (step + 9))
        expected = {name: kept * value + (1 - kept) * generator.weights()[name] for name, value in expected.items()}
    for name, value in averaged(generator).items():
        torch.testing.assert_close(value, expected[name])
    assert any(not torch.equal(value, generator.weights()[name]) for name, value in expected.items())


def test_an_average_can_begin_with_a_resumed_run(teacher, prompts, tmp_path):
    before = learner(settings(teacher))
    train(before, prompts, range(1))
    before[0].save(tmp_path)
    assert not (tmp_path / AVERAGE).exists()
    generator = Generator.from_config(settings(teacher, evaluation={"ema": 0.9}))
    generator.load(tmp_path)
    assert all(torch.equal(v, before[0].weights()[name]) for name, v in averaged(generator).items())


def test_a_whole_network_s_state_is_refused(teacher, config, prompts, tmp_path):
    Generator.from_config(settings(teacher, {})).save(tmp_path)
    with pytest.raises(ValueError, match="was it written for another network"):
        Generator.from_config(config).load(tmp_path)


def test_roles_share_the_family_s_own_tensors(config):
    assert storages(load_family(config.model).teacher) <= storages(inside(Generator.from_config(config).engine.module))


def test_adapters_of_the_demo_teacher_learn():
    """The shipped SDXL-form teacher: the score estimator's loss on fixed samples and the preference loss on fixed pairs fall."""
    settings = ["lora={networks: [generator, score], rank: 8}", "generator.warmup=0", "score.warmup=0", "score.lr=1e-3"]
    config = load_config(None, [*settings, "preference.warmup=0", "preference.lr=1e-3"])
    generator, score = learner(config)
    prompts = Prompts(("a red 4", "a blue 1 above a green 2", "a gray 7"), torch.arange(3))
    fakes = generator.sample_fakes(prompts, levels(prompts, 3, None), seed=1).high_noise
    timesteps = torch.tensor([100, 400, 700])
    losses = [score.denoising_step(fakes, timesteps, 3, torch.arange(3))["score/loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    generator.freeze_reference()
    shape = generator.family.latent_shape
    draw = {name: noise(prompts.indices, shape, 1, name) for name in ("noisy", "winners", "losers")}
    ones = torch.ones(3)
    judged = PreferencePairs(
        prompts=prompts, **draw, weights=ones, margins=ones, timestep=999, next_timestep=749, version=0
    )
    preferred = [generator.preference_step(judged)["preference/loss"] for _ in range(4)]
    assert preferred[-1] < preferred[0]
