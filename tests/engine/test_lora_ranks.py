"""Adapters on several ranks: every engine trains them as plain torch does in one process, and the shared base stays whole on each rank."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import Conditioning, UNetDenoiser
from tests.engine.common import BETAS, DECAY, KINDS, LR, assert_equal_weights, assert_same, engine, shard
from tests.engine.ranks import DEADLINE_S, Checks, Launches, parameters
from tests.tiny import sdxl_pipeline

SMALL = LoraConfig(networks=("generator", "score"), rank=4)
LARGE = SMALL.model_copy(update={"rank": 7000, "targets": ("attn1.to_q",)})
"""Matrices of 7000 x 16: above the 100,000 numbers below which ZeRO stage 3 leaves a parameter whole."""
COUNT = 4


def base() -> UNetDenoiser:
    return UNetDenoiser(sdxl_pipeline().unet).requires_grad_(False).eval()


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss(network: nn.Module, step: int, cut: bool) -> Tensor:
    """Mean over this rank's samples, or over all of them."""
    noisy, target = (drawn(COUNT, 4, 8, 8, seed=10 * step + k) for k in (0, 1))
    conditioning = [drawn(COUNT, *shape, seed=step) for shape in ((12, 24), (16,), (6,))]
    timesteps = torch.tensor([5, 300, 700, 999])
    tensors = [noisy, target, timesteps, *conditioning]
    noisy, target, timesteps, *conditioning = [shard(tensor) for tensor in tensors] if cut else tensors
    return (network(noisy, timesteps, Conditioning(*conditioning)) - target).square().mean()


def plain_steps(network: AdaptedDenoiser, steps: range) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    for step in steps:
        loss(network, step, cut=False).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_adapters_train_average_and_are_copied(kind: str, directory: Path) -> None:
    for lora in (SMALL, LARGE):
        frozen = base()
        before = copy.deepcopy(frozen.state_dict())
        generator = engine(kind, module=AdaptedDenoiser(frozen, lora, seed=0))
        score = engine(kind, module=AdaptedDenoiser(frozen, lora, seed=0), role="score estimator")
        expected = AdaptedDenoiser(frozen, lora, seed=0)
        start = copy.deepcopy(expected.state_dict())
        for step in range(2):
            generator.backward(loss(generator, step, cut=True))
            generator.update()
        reference = generator.copy()
        plain_steps(expected, range(2))
        score.ema_update_from(generator, 0.75)
        weights, averaged = generator.weights(), score.weights()
        assert_equal_weights(generator, expected, tolerance=1e-4)
        for name, value in weights.items():
            assert torch.allclose(averaged[name], 0.75 * start[name] + 0.25 * value, atol=1e-6), name
        with torch.no_grad():
            ours, theirs, teacher, of_copy = (
                loss(network, 7, cut=False) for network in (generator.module, expected, frozen, reference)
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
        torch.testing.assert_close(of_copy, ours, rtol=1e-6, atol=0)
        assert (theirs - teacher).abs() > 1e-4
        assert_same(frozen.state_dict(), before)


CHECKS: Checks = {2: [(check_adapters_train_average_and_are_copied, KINDS)]}


@pytest.mark.timeout(2 * DEADLINE_S + 30)
@pytest.mark.parametrize(("ranks", "check"), parameters(CHECKS))
def test_on_several_ranks(launches: Launches, ranks: int, check: str) -> None:
    launches.expect_success(ranks, check)
