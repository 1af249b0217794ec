"""The plan against what real roles and networks do on this machine: operations and bytes within 15 %, parameters to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashdmd_ray.batch import PreferencePairs, Prompts, PublishedWeights
from flashdmd_ray.checkpoint.checksum import checksum
from flashdmd_ray.config import Config, parse_config
from flashdmd_ray.models.denoiser import UNetDenoiser
from flashdmd_ray.plan.measure import measure
from flashdmd_ray.plan.measure.networks import blank_conditioning
from flashdmd_ray.plan.measure.observe import LiveMemory
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.parts import parts_of
from flashdmd_ray.plan.roles import peak_of, work_of
from flashdmd_ray.runtime import build_runtime
from tests.levels import levels

WITHIN = 0.15
BATCH, PAIRS = 8, 4
SETTINGS = {
    "runtime": "local",
    "batch": BATCH,
    "preference": {"updates": 1, "batch": PAIRS, "candidates": 2, "high_noise": 1},
    "evaluation": {"batch": 2},
}


def settings() -> Config:
    return parse_config(SETTINGS)


class Step:
    """One training step of real roles, each call observed."""

    def __init__(self) -> None:
        self.runtime = build_runtime(settings())
        self.flops: dict[str, float] = {}
        self.peak = self.kept = 0
        for role in (self.runtime.generator, self.runtime.score, self.runtime.discriminator):
            for parameter in role.engine.module.parameters():
                assert parameter.device.type == "cpu"
        self._run()

    def _count(self, name: str, call: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = call()
        self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()
        return result

    def _existing(self) -> Iterator[Tensor]:
        generator, score = self.runtime.generator, self.runtime.score
        modules = [generator.engine.module, score.engine.module, *generator.family._modules.values()]
        for module in modules:
            yield from module.parameters()
            yield from module.buffers()
        for engine in (generator.engine, score.engine):
            yield engine.optimizer_state.masters
            yield engine._gradient

    def _run(self) -> None:
        generator, score = self.runtime.generator, self.runtime.score
        prompts = Prompts(
            tuple(f"a red {i} left of a blue {i} on a gray background" for i in range(BATCH)), torch.arange(BATCH)
        )
        timesteps = torch.full((BATCH,), 500)
        self._count("text encoders", lambda: generator.family.encode(prompts.texts))
        with LiveMemory(self._existing()) as memory:
            prediction = self._count("generator", lambda: generator.generate(prompts, levels(prompts, 1), 1))
            self.kept = memory.live
            matching, _ = self._count("learner critics", lambda: score.dm_gradient(prediction.high_noise, timesteps, 2))
            self._count("generator", lambda: generator.distillation_step(matching, torch.zeros_like(matching)))
            self._count(
                "score estimator",
                lambda: score.denoising_step(prediction.high_noise, timesteps, 3, torch.arange(BATCH)),
            )
            self.peak = memory.peak
        critic = self.runtime.discriminator
        self._count("critic", lambda: critic.gan_gradient(prediction.low_noise, timesteps, 4))
        self._count("critic", lambda: critic.step(prediction.low_noise, torch.arange(BATCH)))
        self._prefer(Prompts(prompts.texts[:PAIRS], torch.arange(PAIRS)))

    def _prefer(self, prompts: Prompts) -> None:
        generator = self.runtime.generator
        weights = generator.weights()
        published = PublishedWeights(version=0, tensors=weights, checksum=checksum(weights))
        candidates = self._count("rollout", lambda: self.runtime.rollouts.candidates(prompts, 0, 5, published))
        self._count("reward", lambda: self.runtime.rewards["reward"].score(candidates))
        generator.freeze_reference()
        values = candidates.values
        pairs = PreferencePairs(
            prompts, candidates.noisy, values[:, 0], values[:, 1], torch.ones(PAIRS), torch.ones(PAIRS), 999, 749, 0
        )
        self._count("prefer", lambda: generator.preference_step(pairs))


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


@pytest.fixture(scope="module")
def planned() -> dict[str, float]:
    config = settings()
    works = work_of(config, models_of(config))
    assert works is not None
    found: dict[str, float] = {}
    for work in works:
        found[f"{work.group}: {work.part}"] = work.flops
    return found


def test_operations_of_every_role(step, planned):
    learner = {name.removeprefix("learner: "): flops for name, flops in planned.items() if name.startswith("learner: ")}
    critic = sum(flops for name, flops in planned.items() if name.startswith("discriminator: "))
    real = step.flops
    expected = {
        # The preference update trains the generator too; its reference is a forward without gradients.
        "generator": (real["generator"] + real["prefer"], learner["generator"] + learner["reference policy"]),
        "score estimator": (
            real["learner critics"] + real["score estimator"],
            learner["teacher"] + learner["score estimator"],
        ),
        "discriminator": (real["critic"], critic),
        # One rollout and round of rewards for the update, one for the hack monitor's probe.
        "rollout": (2 * real["rollout"], planned["rollout: rollout"] + planned["rollout: VAE"]),
        "reward": (2 * real["reward"], sum(flops for name, flops in planned.items() if name.startswith("reward: "))),
    }
    for role, (measured, estimate) in expected.items():
        assert estimate == pytest.approx(measured, rel=WITHIN), role
    # Planned for the prompts of distillation and of preferences; here the latter are among the former.
    assert learner["text encoders"] * BATCH / 16 == pytest.approx(real["text encoders"], rel=WITHIN)


def test_activations_of_the_learner(step):
    config = settings()
    works = [work for work in work_of(config, models_of(config)) or [] if work.group == "learner"]
    generator = next(work for work in works if work.part == "generator")
    assert generator.kept == pytest.approx(step.kept, rel=WITHIN)
    assert peak_of(works) == pytest.approx(step.peak, rel=WITHIN)


def test_bytes_that_roles_keep(step):
    held = {(part.group, part.name): part for part in parts_of(settings())}
    for name, role in (("generator", step.runtime.generator), ("score estimator", step.runtime.score)):
        engine, part = role.engine, held["learner", name].held
        assert part.weights == sum(p.nbytes for p in engine.module.parameters())
        assert part.gradients == engine._gradient.nbytes
        moments = [m for state in engine.optimizer_state.moments.values() for m in state.values() if m.ndim]
        assert part.optimizer == sum(m.nbytes for m in moments)
    family = step.runtime.generator.family
    assert held["learner", "teacher"].held.weights == sum(p.nbytes for p in family.teacher.parameters())
    assert held["learner", "VAE"].held.weights == sum(p.nbytes for p in family.vae.parameters())
    reference = step.runtime.generator.reference
    assert held["learner", "reference policy"].held.weights == sum(p.nbytes for p in reference.parameters())
    critic = step.runtime.discriminator.engine
    heads = held["discriminator", "discriminator: heads"].held
    assert heads.weights == sum(p.nbytes for p in critic.module.heads.parameters())
    assert heads.gradients + heads.optimizer == 3 * heads.weights
    sam = held["discriminator", "discriminator: SAM"].held
    assert sam.weights == sum(p.nbytes for p in critic.module.features.parameters())


MIDDLE: dict[str, Any] = {
    "block_out_channels": [128, 256, 384],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [4, 8, 12],
    "cross_attention_dim": 512,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 64,
    "projection_class_embeddings_input_dim": 640,
}


def test_a_network_of_middle_size():
    """The meta device against a real forward and backward of an SDXL-form U-Net at batch 4."""
    spec = {
        "kind": "denoiser",
        "family": "sdxl",
        "network": MIDDLE,
        "dtype": "float32",
        "latent": [4, 16, 16],
        "tokens": 16,
    }
    spec["checkpointing"] = False
    cost = measure(spec)
    network = UNetDenoiser(UNet2DConditionModel.from_config(MIDDLE)).train()
    assert 2e7 < cost["parameters"] == cost["trained"] == sum(p.numel() for p in network.parameters()) < 6e7
    conditioning = blank_conditioning(spec, 4)
    weights = {p.data_ptr() for p in network.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = network(torch.randn(4, 4, 16, 16), torch.full((4,), 500), conditioning)
        output.backward(torch.ones_like(output))
    training = cost["uses"]["training"]
    at_four = {figure: constant + 4 * slope for figure, (constant, slope) in training.items()}
    assert at_four["flops"] == pytest.approx(counter.get_total_flops(), rel=WITHIN)
    assert at_four["kept"] == pytest.approx(sum(saved.values()), rel=WITHIN)
