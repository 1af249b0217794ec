"""What saves memory changes no result: gradient checkpointing bit for bit, micro-batches to rounding. The shipped weights, real roles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flashdmd_ray.batch import Latents, Prompts, noise
from flashdmd_ray.config import Config, load_config
from flashdmd_ray.engine import Engine
from flashdmd_ray.models.discriminator import Recomputed
from flashdmd_ray.roles.discriminator import Discriminator
from flashdmd_ray.roles.generator import Generator
from flashdmd_ray.roles.networks import load_family
from flashdmd_ray.roles.score_estimator import ScoreEstimator
from tests.levels import levels

TEXTS = ("a red 4", "a blue 1 above a green 2", "a gray 7")
CHECKPOINTED = "engine.gradient_checkpointing=true"


def configured(*settings: str) -> Config:
    return load_config(None, ["generator.warmup=0", "score.warmup=0", "batch=3", "preference.batch=3", *settings])


@pytest.fixture(autouse=True)
def one_decoder() -> Iterator[None]:
    """The family is shared by the roles of a process, so a role leaves its wish for a recomputed decoder there."""
    yield
    load_family(configured().model).vae.disable_gradient_checkpointing()


def prompts() -> Prompts:
    return Prompts(TEXTS, torch.arange(len(TEXTS)))


def latents(seed: int) -> Latents:
    shape = load_family(configured().model).latent_shape
    return Latents(noise(prompts().indices, shape, seed, "latents"), prompts())


def spied(engine: Engine) -> list[Tensor]:
    """Collects the gradient that each update hands to the optimizer, for comparison without AdamW's division."""
    seen: list[Tensor] = []
    plain = engine._gradient_norm

    def norm() -> Tensor:
        result = plain()
        seen.append(engine._gradient.clone())  # type: ignore[attr-defined]
        return result

    engine._gradient_norm = norm  # type: ignore[method-assign]
    return seen


def trained_discriminator(*settings: str) -> tuple[Discriminator, list[Tensor]]:
    role = Discriminator.from_config(configured(*settings))
    gradients = spied(role.engine)
    gradient, answered = role.gan_gradient(latents(0), torch.zeros(3, dtype=torch.int64), seed=0)
    updated = role.step(latents(1), torch.arange(3))
    return role, [gradient, torch.tensor([*answered.values(), *updated.values()]), *gradients]


def trained_generator(*settings: str) -> tuple[Generator, list[Tensor]]:
    role = Generator.from_config(configured(*settings))
    gradients = spied(role.engine)
    prediction = role.generate(prompts(), levels(prompts(), 1), seed=0)
    updated = role.distillation_step(latents(1).values, 0.1 * latents(2).values)
    return role, [
        prediction.high_noise.values,
        prediction.low_noise.values,
        torch.tensor(list(updated.values())),
        *gradients,
    ]


def trained_estimator(*settings: str) -> tuple[ScoreEstimator, list[Tensor]]:
    role = ScoreEstimator.from_config(configured(*settings))
    gradients = spied(role.engine)
    updated = role.denoising_step(latents(0), torch.tensor([30, 400, 900]), 0, torch.arange(3))
    return role, [torch.tensor(list(updated.values())), *gradients]


def is_checkpointed(module: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) or isinstance(m, Recomputed) for m in module.modules())


@pytest.mark.parametrize("train", [trained_discriminator, trained_generator, trained_estimator])
def test_gradient_checkpointing_changes_no_bit(train):
    """Denoisers, SAM and decoder recompute; every answer, gradient and weight is the same."""
    (plain, expected), (saving, got) = train(), train(CHECKPOINTED)
    assert not is_checkpointed(plain.engine.module)
    assert is_checkpointed(saving.engine.module)
    decoder = load_family(configured().model).vae.decoder
    assert decoder.gradient_checkpointing == (train is trained_discriminator)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    before, after = plain.engine.weights(), saving.engine.weights()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), after.values(), strict=True))


@pytest.mark.parametrize("train", [trained_discriminator, trained_generator, trained_estimator])
def test_micro_batches_make_the_same_update(train):
    """Three samples in two micro-batches, of one and two: the mean over all three, however the batch is cut."""
    (_, expected), (cut, got) = train(), train("engine.accumulation=2")
    assert cut.engine.cut(3) == [slice(0, 1), slice(1, 3)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
