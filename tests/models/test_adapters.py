"""LoRA networks on a shared base: what they own, what they leave alone, and that they cannot disturb one another."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.models.adapters import AdaptedDenoiser, share_weights
from flashdmd_ray.models.denoiser import Conditioning, Denoiser, UNetDenoiser
from tests.tiny import sdxl_pipeline

LORA = LoraConfig(networks=("generator", "score"), rank=4, alpha=8)


@pytest.fixture
def base() -> UNetDenoiser:
    return UNetDenoiser(sdxl_pipeline().unet).requires_grad_(False).eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((2, 12, 24), (2, 16), (2, 6))
    conditioning = Conditioning(*(torch.randn(shape, generator=draw) for shape in shapes))
    return torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([40, 900]), conditioning


def trained(network: AdaptedDenoiser, seed: int = 0) -> AdaptedDenoiser:
    """As if it had been trained: no matrix is zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return network


def storages(*modules: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for m in modules for tensor in (*m.parameters(), *m.buffers())}


def inside(network: AdaptedDenoiser) -> Denoiser:
    """All that a network computes with, the base included."""
    return network._adapted[0]


def test_a_new_adapter_changes_nothing(base, inputs):
    network = AdaptedDenoiser(base, LORA, seed=0)
    assert torch.equal(network(*inputs), base(*inputs))
    assert torch.equal(network.mid_features(*inputs), base.mid_features(*inputs))
    assert network.mid_width == base.mid_width


def test_the_base_is_not_touched(base, inputs):
    expected, names = base(*inputs), [name for name, _ in base.named_modules()]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    network = trained(AdaptedDenoiser(base, LORA, seed=0, gradient_checkpointing=True))
    network(*inputs).square().mean().backward()
    assert torch.equal(base(*inputs), expected)
    assert [name for name, _ in base.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())
    assert not base.network.is_gradient_checkpointing


def test_parameters_are_the_adapter_alone_by_their_diffusers_names(base):
    network = AdaptedDenoiser(base, LORA, seed=0)
    names = list(network.state_dict())
    assert names == [name for name, _ in network.named_parameters()]
    layers = [name for name, m in base.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert names == [f"{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())


def test_one_base_in_memory_for_any_number_of_networks(base):
    generator, score = (AdaptedDenoiser(base, LORA, seed=0) for _ in range(2))
    reference = copy.deepcopy(generator)
    together = storages(base, *map(inside, (generator, score, reference)))
    assert len(together) == len(storages(base)) + sum(len(storages(n)) for n in (generator, score, reference))
    assert storages(generator).isdisjoint(storages(reference))


def test_the_adapter_is_the_low_rank_update_of_the_paper(base, inputs):
    """h = W x + alpha / rank B A x, merged into a copy of the base."""
    network = trained(AdaptedDenoiser(base, LORA, seed=0))
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = network.state_dict()
    merged = network.merge_into(copy.deepcopy(base))
    update = merged.get_submodule(path).weight - base.get_submodule(path).weight
    torch.testing.assert_close(update, 2 * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"])
    torch.testing.assert_close(merged(*inputs), network(*inputs), atol=1e-5, rtol=1e-4)
    assert (network(*inputs) - base(*inputs)).abs().max() > 1e-2


def test_equal_seeds_start_equal_and_the_ambient_generator_is_left_alone(base):
    torch.manual_seed(5)
    ambient = torch.get_rng_state()
    one = AdaptedDenoiser(base, LORA, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), ambient)
    torch.manual_seed(6)
    two, other = (AdaptedDenoiser(base, LORA, seed=seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_another_network_between_forward_and_backward_changes_no_gradient(base, inputs, checkpointing):
    """Under gradient checkpointing the forward is computed again in the backward pass: on its own adapter."""

    def gradients(disturbed: bool, checkpointing: bool) -> dict[str, torch.Tensor]:
        generator = trained(AdaptedDenoiser(base, LORA, seed=0, gradient_checkpointing=checkpointing))
        score = trained(AdaptedDenoiser(base, LORA, seed=0, gradient_checkpointing=checkpointing), seed=1)
        loss = generator(*inputs).square().mean()
        if disturbed:
            score(*inputs).square().mean().backward()
            base(*inputs)
        loss.backward()
        return {name: p.grad for name, p in generator.named_parameters()}

    expected, found = gradients(False, False), gradients(True, checkpointing)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=0, rtol=0 if not checkpointing else 1e-5)


def test_a_copy_trains_on_its_own(base, inputs):
    network = trained(AdaptedDenoiser(base, LORA, seed=0))
    frozen = copy.deepcopy(network).requires_grad_(False)
    expected = network(*inputs)
    trained(network, seed=3)
    assert torch.equal(frozen(*inputs), expected)
    assert not torch.equal(network(*inputs), expected)
    assert all(p.requires_grad for p in network.parameters())


def test_a_half_precision_base_has_float32_adapters(base, inputs):
    half = base.to(torch.bfloat16)
    network = trained(AdaptedDenoiser(half, LORA, seed=0))
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    network(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


def test_targets_are_layers_of_the_network(base, inputs):
    conv = AdaptedDenoiser(base, LORA.model_copy(update={"targets": ("conv1", "ff.net.2")}), seed=0)
    assert {name.rsplit(".lora_")[0].split(".")[-1] for name in conv.state_dict()} == {"conv1", "2"}
    merged = trained(conv).merge_into(copy.deepcopy(base))
    torch.testing.assert_close(merged(*inputs), conv(*inputs), atol=1e-5, rtol=1e-4)
    for target, message in {
        "to_z": "'to_z' names no layer of UNet2DConditionModel",
        "norm1": "'norm1' names .*norm1, a ",
    }.items():
        with pytest.raises(ValueError, match=f"lora.targets: {message}"):
            AdaptedDenoiser(base, LORA.model_copy(update={"targets": (target,)}), seed=0)


def test_sharing_keeps_tensors_and_copies_structure(base):
    twin = share_weights(base)
    assert twin is not base
    assert storages(twin) == storages(base)
    assert all(mine is theirs for mine, theirs in zip(twin.parameters(), base.parameters(), strict=True))


def test_weights_reach_another_process_as_the_adapter_only(base, inputs, tmp_path: Path):
    """What a rollout worker does: its own base, the published tensors."""
    network = trained(AdaptedDenoiser(base, LORA, seed=0))
    elsewhere = AdaptedDenoiser(UNetDenoiser(sdxl_pipeline().unet).requires_grad_(False).eval(), LORA, seed=9)
    elsewhere.load_state_dict({name: value.clone() for name, value in network.state_dict().items()})
    assert torch.equal(elsewhere(*inputs), network(*inputs))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        elsewhere.load_state_dict(base.state_dict())
