"""LoRA (arXiv 2106.09685) on a frozen base: networks that own nothing but their adapter.

Teacher, generator, score estimator and reference policy can be one set of base weights and several adapters. Every
network here has module objects of its own around the base's very tensors, with peft's layers put in between. So no
network is ever switched from one adapter to another: a forward, and its repetition under gradient checkpointing, runs
on the adapter it was built with, and the base without an adapter stays the untouched teacher.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Self, TypeVar

import torch
from diffusers import ModelMixin
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.models.denoiser import Conditioning, Denoiser

ATTENTION_PROJECTIONS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # the text stream of SD3's joint attention
)
"""The layers adapted when `lora.targets` is null, where a network has them."""

_NAME = "lora"  # peft's name of an adapter; each network has one
_Module = TypeVar("_Module", bound=nn.Module)


class AdaptedDenoiser(Denoiser):
    """A denoiser whose parameters are those of its adapter: what engines train, checkpoints keep and rollouts receive.

    They are called as diffusers calls them in a LoRA file, <stock module>.<layer>.lora_{A,B}.weight, and are float32
    whatever the base is. An adapter starts as no change: B = 0, and A is a function of the seed.
    """

    def __init__(self, base: Denoiser, lora: LoraConfig, seed: int, gradient_checkpointing: bool = False) -> None:
        """Put adapters on `base`, which is frozen, on its device, and neither changed nor copied.

        Raises ValueError for a target that names no layer of it, or none that can be adapted.
        """
        super().__init__()
        adapted = share_weights(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(adapted, lora)
        if gradient_checkpointing:
            adapted.network.enable_gradient_checkpointing()
        self._adapted = (adapted,)  # in a tuple, so that the base's parameters are not this module's
        for path, layer in self.layers().items():
            _register(self, path, layer)
        self.float().requires_grad_(True).train()

    @property
    def network(self) -> ModelMixin:
        return self._adapted[0].network

    @property
    def mid_width(self) -> int:
        return self._adapted[0].mid_width

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        prediction: Tensor = self._adapted[0](noisy, timesteps, conditioning)
        return prediction

    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self._adapted[0].mid_features(noisy, timesteps, conditioning)

    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by their path in the base denoiser."""
        return {path: m for path, m in self._adapted[0].named_modules() if isinstance(m, LoraLayer)}

    @torch.no_grad()
    def merge_into(self, plain: Denoiser) -> Denoiser:
        """Add this adapter's W += (alpha / rank) B A to `plain`, a copy of the base without adapters; returns it."""
        for path, layer in self.layers().items():
            weight = plain.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            weight.add_(layer.get_delta_weight(_NAME).to(weight))
        return plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the adapter, share the base."""
        own = {id(p) for p in self.parameters()}
        memo |= {key: tensor for key, tensor in _tensors(self._adapted[0]).items() if key not in own}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def share_weights(module: _Module) -> _Module:
    """Copy the structure of `module` around the same parameters and buffers: two module trees, one set of tensors."""
    return copy.deepcopy(module, dict(_tensors(module)))


def _tensors(module: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}


def _inject(denoiser: Denoiser, lora: LoraConfig) -> None:
    targets = ATTENTION_PROJECTIONS if lora.targets is None else lora.targets
    layers = dict(denoiser.named_modules())
    for target in targets if lora.targets is not None else ():
        matches = [path for path in layers if _is_named(path, target)]
        if not matches:
            raise ValueError(
                f"lora.targets: '{target}' names no layer of {type(denoiser.network).__name__}; null adapts its attention projections"
            )
        other = [path for path in matches if not isinstance(layers[path], nn.Linear | nn.Conv2d)]
        if other:
            raise ValueError(
                f"lora.targets: '{target}' names {other[0]}, a {type(layers[other[0]]).__name__}; name linear layers or convolutions"
            )
    config = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(targets), lora_dropout=0.0, bias="none"
    )
    inject_adapter_in_model(config, denoiser, adapter_name=_NAME)


def _is_named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _register(root: nn.Module, path: str, layer: LoraLayer) -> None:
    """Make the layer's two adapter matrices descendants of `root` under the layer's path."""
    branch = root
    for name in path.split("."):
        if name not in dict(branch.named_children()):
            branch.add_module(name, nn.Module())
        branch = branch.get_submodule(name)
    branch.add_module("lora_A", layer.lora_A[_NAME])
    branch.add_module("lora_B", layer.lora_B[_NAME])
