"""A pipeline's weights under the names of the original layout, which ComfyUI and A1111 load: diffusers' converters backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from flashdmd_ray.catalog.families import FamilyEntry

OPEN_CLIP = ("conditioner.embedders.1.",)
"""Prefixes of text encoders that are always an OpenCLIP, whose three attention projections are one matrix."""
UNET_NAMES = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_NAMES = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
SD3_NAMES = {
    "pos_embed.proj.": "x_embedder.proj.",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "proj_out.": "final_layer.linear.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
    "transformer_blocks": "joint_blocks",
}


def original_weights(pipeline: Any, family: FamilyEntry) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a stock pipeline of `family` in the original layout, on their own device.

    Raises ValueError for a text projection that has no place there.
    """
    network = getattr(pipeline, family.denoiser)
    yield from _unet(network) if family.denoiser == "unet" else _sd3_transformer(network)
    yield from _vae(pipeline.vae)
    for folder, start in {**family.text_encoders, **family.optional_encoders}.items():
        if (encoder := getattr(pipeline, folder)) is not None:
            yield from _text_encoder(encoder, start)
    stated = pipeline.scheduler.config
    for marker, key, value in (
        ("v_pred", "prediction_type", "v_prediction"),
        ("ztsnr", "rescale_betas_zero_snr", True),
    ):
        if stated.get(key) == value:
            yield marker, torch.zeros(1)


def _text_encoder(encoder: Any, start: str) -> Iterator[tuple[str, Tensor]]:
    """SDXL's second encoder and that of 2.1 have OpenCLIP's names, which tell its activation; the others those of transformers."""
    if start in OPEN_CLIP or (start == "cond_stage_model." and encoder.config.hidden_act == "gelu"):
        yield from _open_clip(encoder, f"{start}model.")
        return
    for name, tensor in encoder.state_dict().items():
        if start == "text_encoders.clip_l." and name == "text_projection.weight":
            if not torch.equal(tensor, torch.eye(len(tensor), dtype=tensor.dtype, device=tensor.device)):
                raise ValueError(
                    "the first text encoder has a projection, for which a single file of SD3 has no place; export a pipeline"
                )
            continue
        outside = encoder.config.model_type == "t5" or name.startswith(("text_model.", "text_projection."))
        yield f"{start}transformer.{'' if outside else 'text_model.'}{name}", tensor


def _unet(network: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    step = network.config.layers_per_block + 1
    with_attention = [hasattr(block, "attentions") for block in network.up_blocks]
    for name, tensor in network.state_dict().items():
        kind, block, rest = (*name.split(".", 2), "")[:3]
        if kind in ("down_blocks", "up_blocks"):
            what, layer, rest = rest.split(".", 2)
            first = int(block) * step + (1 if kind == "down_blocks" else 0)
            side = "input_blocks" if kind == "down_blocks" else "output_blocks"
            if what == "downsamplers":
                new = f"{side}.{first + step - 1}.0.op.{rest.removeprefix('conv.')}"
            elif what == "upsamplers":
                new = f"{side}.{first + step - 1}.{1 + with_attention[int(block)]}.{rest}"
            else:
                new = f"{side}.{first + int(layer)}.{int(what == 'attentions')}.{rest}"
        else:
            new = _renamed(name, {old: value for old, value in UNET_NAMES.items() if name.startswith(old)})
        if ".resnets." in name:
            new = _renamed(new, RESNET_NAMES)
        yield f"model.diffusion_model.{new}", tensor


def _vae(network: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    count = len(network.config.block_out_channels)
    for name, tensor in network.state_dict().items():
        new = _renamed(name, VAE_NAMES)
        for i in range(count):
            new = new.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{count - 1 - i}.")
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original attention is made of 1x1 convolutions
        yield f"first_stage_model.{new.replace('resnets', 'block')}", tensor


def _open_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    yield f"{prefix}positional_embedding", state["embeddings.position_embedding.weight"]
    yield f"{prefix}token_embedding.weight", state["embeddings.token_embedding.weight"]
    if "text_projection.weight" in state:
        yield f"{prefix}text_projection", state["text_projection.weight"].T
    for kind in ("weight", "bias"):
        yield f"{prefix}ln_final.{kind}", state[f"final_layer_norm.{kind}"]
        for layer in range(encoder.config.num_hidden_layers):
            old, new = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            joined = torch.cat([state[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            yield f"{new}attn.in_proj_{kind}", joined
            for name, original in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                yield f"{new}{original}.{kind}", state[f"{old}{name}.{kind}"]


def _sd3_transformer(network: SD3Transformer2DModel) -> Iterator[tuple[str, Tensor]]:
    state, last = dict(network.state_dict()), len(network.transformer_blocks) - 1
    joined = {
        "x_block.attn": "attn.to_q attn.to_k attn.to_v",
        "context_block.attn": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "x_block.attn2": "attn2.to_q attn2.to_k attn2.to_v",
    }
    for block in range(last + 1):
        for new, names in joined.items():
            for kind in ("weight", "bias"):
                parts = [state.pop(f"transformer_blocks.{block}.{name}.{kind}", None) for name in names.split()]
                if parts[0] is not None:  # the second attention is SD3.5's, in some blocks
                    yield f"model.diffusion_model.joint_blocks.{block}.{new}.qkv.{kind}", torch.cat(parts)
    for name, tensor in state.items():
        swapped = name.startswith(("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear."))
        if swapped:  # the original has shift before scale
            tensor = torch.cat(tensor.chunk(2)[::-1])
        new = name.replace("norm_out.linear.", "final_layer.adaLN_modulation.1.")
        yield f"model.diffusion_model.{_renamed(new, SD3_NAMES)}", tensor


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
