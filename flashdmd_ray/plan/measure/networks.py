"""The networks of a plan on the meta device, and the calls that roles make of them. Every spec is one of `flashdmd_ray.plan.specs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from flashdmd_ray.config import LoraConfig
from flashdmd_ray.models import denoiser_class
from flashdmd_ray.models.adapters import AdaptedDenoiser
from flashdmd_ray.models.denoiser import Conditioning, Denoiser, UNetDenoiser
from flashdmd_ray.models.discriminator import PixelDiscriminator
from flashdmd_ray.models.latent_reward import MMDiTLatentReward, UNetLatentReward
from flashdmd_ray.models.sam import fuse_attention
from flashdmd_ray.plan.measure.observe import Observer, Use

Uses = dict[str, Use]
BATCHES = (1, 2)
"""Two sizes: everything here is a constant plus so much for each sample."""


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """parameters: of the network in all. trained: those with gradients. uses: by name, the figures of `Use` as [constant, per sample]."""
    with torch.device("meta"):
        parameters, trained, observe = _NETWORKS[spec["kind"]](spec)
        one, two = (observe(batch) for batch in BATCHES)
    uses = {
        name: {
            figure: _line(getattr(one[name], figure), getattr(two[name], figure))
            for figure in ("flops", "kept", "peak", "launches")
        }
        for name in one
    }
    return {"parameters": parameters, "trained": trained, "uses": uses}


def _line(at_one: float, at_two: float) -> list[float]:
    slope = max(0.0, at_two - at_one)
    return [max(0.0, at_one - slope), slope]


Network = tuple[int, int, Callable[[int], Uses]]


def _denoiser(spec: Mapping[str, Any]) -> Network:
    frozen = build_denoiser(spec).to(_dtype(spec)).requires_grad_(False).eval()
    trained: Denoiser = frozen
    if lora := spec.get("lora"):
        trained = AdaptedDenoiser(frozen, LoraConfig.model_validate(lora["config"]), 0, spec["checkpointing"])
        for parameter in trained.parameters():
            parameter.data = parameter.data.to(getattr(torch, lora["dtype"]))
    elif "checkpointing" in spec:
        trained.requires_grad_(True).train()
        if spec["checkpointing"]:
            trained.network.enable_gradient_checkpointing()

    def observe(batch: int) -> Uses:
        noisy = torch.empty(batch, *spec["latent"])
        timesteps = torch.empty(batch, dtype=torch.int64)
        conditioning = blank_conditioning(spec, batch)
        inputs = [noisy, timesteps, *(x for x in (conditioning.prompt_embeds, conditioning.pooled) if x is not None)]
        observer = Observer(_All(frozen, trained), inputs)
        call: Callable[[], Tensor] = partial(trained, noisy, timesteps, conditioning)
        uses = {"forward": observer.forward(call)}
        if "checkpointing" in spec:
            uses["training"] = observer.training(call)
        if spec.get("mid"):
            judge: Callable[[], Tensor] = partial(trained.mid_features, noisy, timesteps, conditioning)
            uses["mid"] = observer.training(judge)
        return uses

    return _count(frozen), sum(p.numel() for p in trained.parameters() if p.requires_grad), observe


class _All(nn.Module):
    """Parameters that are there before a call: an adapter does not list its base's parameters as its own."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.all = nn.ModuleList(modules)


def build_denoiser(spec: Mapping[str, Any]) -> Denoiser:
    """The denoiser of a spec, with random weights."""
    return denoiser_class(spec["family"]).from_network_config(spec["network"])


def blank_conditioning(spec: Mapping[str, Any], batch: int) -> Conditioning:
    """Conditioning float32 of the shapes that the denoiser of a spec reads."""
    # The spec of a U-Net's latent reward names no family: all U-Nets are alike.
    denoiser = denoiser_class(spec["family"]) if "family" in spec else UNetDenoiser
    return denoiser.empty_conditioning(spec["network"], batch, spec["tokens"])


def _vae(spec: Mapping[str, Any]) -> Network:
    """Decoding without and with a gradient to the latents, and encoding."""
    vae = AutoencoderKL.from_config(dict(spec["network"])).to(_dtype(spec)).requires_grad_(False).eval()
    if spec["checkpointing"]:
        vae.enable_gradient_checkpointing()

    def observe(batch: int) -> Uses:
        latents = torch.empty(batch, *spec["latent"], dtype=_dtype(spec), requires_grad=True)
        images = torch.empty(batch, 3, *spec["image"], dtype=_dtype(spec))
        observer = Observer(vae, [latents, images])

        def decode() -> Tensor:
            return vae.decode(latents).sample.float()

        return {
            "forward": observer.forward(decode),
            "training": observer.training(decode, towards=[latents]),
            "encode": observer.forward(lambda: vae.encode(images).latent_dist.mean),
        }

    return _count(vae), 0, observe


def _judge(spec: Mapping[str, Any]) -> Network:
    """SAM and heads: the gradient of the images, and the heads' own update."""
    sam = build_sam(spec["network"], max(spec["image"])).to(_dtype(spec))
    network = PixelDiscriminator(sam, spec["hidden"], spec["prompt_width"], spec["checkpointing"])

    def observe(batch: int) -> Uses:
        images = torch.empty(batch, 3, *spec["image"], requires_grad=True)
        prompts = None if spec["prompt_width"] is None else torch.empty(batch, spec["prompt_width"])
        observer = Observer(network, [images])
        return {
            "towards": observer.training(lambda: network(images, prompts), towards=[images]),
            "training": observer.training(lambda: network(images.detach(), prompts)),
        }

    return _count(network.features), sum(p.numel() for p in network.heads.parameters()), observe


def build_sam(sizes: Mapping[str, Any], image_size: int) -> ImageEncoderViT:
    """SAM's image encoder with random weights, for images of `image_size` pixels, as `load_sam_encoder` makes it."""
    encoder = ImageEncoderViT(
        img_size=image_size,
        patch_size=sizes["patch_size"],
        embed_dim=sizes["embed_dim"],
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        use_rel_pos=True,
        window_size=sizes["window_size"],
        global_attn_indexes=tuple(sizes["global_attn_indexes"]),
        out_chans=sizes.get("prompt_dim", 256),
    )
    return fuse_attention(encoder)


def _latent_reward(spec: Mapping[str, Any]) -> Network:
    form = MMDiTLatentReward if "family" in spec else UNetLatentReward
    model = form.from_description({**spec, form.kind: spec["network"]})
    model = model.to(_dtype(spec)).requires_grad_(False).eval()

    def observe(batch: int) -> Uses:
        noisy, timesteps = torch.empty(batch, *spec["latent"]), torch.empty(batch, dtype=torch.int64)
        conditioning = blank_conditioning(spec, batch)
        return {"forward": Observer(model, [noisy]).forward(lambda: model(noisy, timesteps, conditioning))}

    return _count(model), 0, observe


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _dtype(spec: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, spec["dtype"])
    return dtype


_NETWORKS: dict[str, Callable[[Mapping[str, Any]], Network]] = {
    "denoiser": _denoiser,
    "vae": _vae,
    "judge": _judge,
    "latent_reward": _latent_reward,
}
