"""The plan against what real roles and networks do on this machine: operations and bytes within 15 %, parameters to the byte."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flashdmd_ray.config import Config, LoraConfig, parse_config
from flashdmd_ray.data import build_images
from flashdmd_ray.driver import train
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import UNetDenoiser
from flashdmd_ray.plan.mean_step import REPEATS, step_of
from flashdmd_ray.plan.measure import measure
from flashdmd_ray.plan.measure.networks import blank_conditioning
from flashdmd_ray.plan.measure.observe import LiveMemory
from flashdmd_ray.plan.models import models_of
from flashdmd_ray.plan.parts import parts_of
from flashdmd_ray.runtime import build_runtime

WITHIN = 0.15
BATCH, PAIRS = 8, 4
SETTINGS = {
    "runtime": "local",
    "batch": BATCH,
    "preference": {"updates": 1, "batch": PAIRS, "candidates": 2, "high_noise": 1},
    "monitor": {"enabled": False},
    "evaluation": {"batch": 2},
}


def settings() -> Config:
    return parse_config(SETTINGS)


class Steps:
    """A run of the given steps."""

    preference_rate = 1.0

    def __init__(self, steps: range) -> None:
        self.steps = lambda: steps

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        assert metrics


class Step:
    """Steps of the real driver and roles, observed one after the other: their operations, then their memory."""

    def __init__(self) -> None:
        self.config = settings()
        self.runtime = build_runtime(self.config)
        data = build_images(self.config.data, self.config.seed)
        train(self.config, self.runtime, data, Steps(range(1)))  # checks the rewards' ranking, once in a run
        with FlopCounterMode(display=False) as counter:
            train(self.config, self.runtime, data, Steps(range(1, REPEATS + 1)))
        self.flops = counter.get_total_flops() / REPEATS
        alone = parse_config(
            SETTINGS | {"preference": {"updates": 0}}
        )  # publishing copies weights, which no plan counts
        there = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.layout is torch.strided]
        with LiveMemory(there) as memory:
            train(alone, self.runtime, data, Steps(range(REPEATS + 1, REPEATS + 2)))
        self.peak = memory.peak


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


def test_operations_of_a_step(step):
    config = settings()
    planned = step_of(config, models_of(config))
    assert sum(work.flops for work in planned.works) == pytest.approx(step.flops, rel=WITHIN)


def test_activations_of_a_step(step):
    config = parse_config(SETTINGS | {"preference": {"updates": 0}})
    assert step_of(config, models_of(config)).peaks["local"] == pytest.approx(step.peak, rel=WITHIN)


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


CHECKPOINTED: dict[str, Any] = {
    "block_out_channels": [96, 192, 384],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [3, 6, 12],
    "transformer_layers_per_block": [1, 2, 4],
    "cross_attention_dim": 256,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 320,
}


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 2**10


def growth_mib(call: Callable[[], object]) -> float:
    """How far the process grows during a call, beyond what it had after the same call before."""
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would serve this call without growth
    before, most, done = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, anonymous_mib())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most - before


CHECKPOINTED_SPEC = {
    "kind": "denoiser",
    "family": "sdxl",
    "network": CHECKPOINTED,
    "dtype": "float32",
    "latent": [4, 32, 32],
    "tokens": 77,
    "checkpointing": True,
    "lora": {"config": {"networks": ["generator"], "rank": 16, "targets": None}, "dtype": "float32"},
}


def checkpointed_growth() -> float:
    """MiB that training a checkpointed SDXL-form network with adapters at batch 2 takes."""
    mmap_threshold = (
        -3
    )  # large blocks are unmapped when freed; otherwise glibc keeps them, and growth is luck: 130 to 700 MiB
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**16)
    base = UNetDenoiser(UNet2DConditionModel.from_config(CHECKPOINTED)).requires_grad_(False).eval()
    network = AdaptedDenoiser(base, LoraConfig(networks=["generator"], rank=16), 0, True)
    inputs = torch.randn(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64), blank_conditioning(CHECKPOINTED_SPEC, 2)

    def train_once() -> None:
        network.zero_grad(set_to_none=True)
        network(*inputs).sum().backward()

    return growth_mib(train_once)


def test_a_checkpointed_network_grows_the_process_as_planned():
    """The operation counter must not keep alive what is computed again."""
    constant, slope = measure(CHECKPOINTED_SPEC)["uses"]["training"]["peak"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # memory that other tests freed hides growth
        grown = fresh.submit(checkpointed_growth).result(timeout=300)
    assert (constant + 2 * slope) / 2**20 == pytest.approx(grown, rel=WITHIN)
