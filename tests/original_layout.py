"""A pipeline as one .safetensors file in the original layout: the names that diffusers' converters read, written backwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

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
    "attn.to_add_out.": "context_block.attn.proj.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
    "transformer_blocks": "joint_blocks",
}


def write_sdxl(pipeline: object, path: Path) -> Path:
    """SDXL: the second text encoder is an OpenCLIP, whose attention projections are one matrix."""
    parts = [
        *unet(pipeline.unet),  # type: ignore[attr-defined]
        *vae(pipeline.vae),  # type: ignore[attr-defined]
        *clip(pipeline.text_encoder, "conditioner.embedders.0.transformer."),  # type: ignore[attr-defined]
        *open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model."),  # type: ignore[attr-defined]
    ]
    return _write(parts, path)


def write_sd15(pipeline: object, path: Path) -> Path:
    parts = [
        *unet(pipeline.unet),  # type: ignore[attr-defined]
        *vae(pipeline.vae),  # type: ignore[attr-defined]
        *clip(pipeline.text_encoder, "cond_stage_model.transformer."),  # type: ignore[attr-defined]
    ]
    return _write(parts, path)


def write_sd3(pipeline: object, path: Path) -> Path:
    """SD3 with both CLIPs. The first one's text projection is not in such a file: diffusers takes the identity."""
    parts = [
        *sd3_transformer(pipeline.transformer),  # type: ignore[attr-defined]
        *vae(pipeline.vae),  # type: ignore[attr-defined]
        *clip(pipeline.text_encoder, "text_encoders.clip_l.transformer."),  # type: ignore[attr-defined]
        *clip(pipeline.text_encoder_2, "text_encoders.clip_g.transformer."),  # type: ignore[attr-defined]
    ]
    return _write(
        [part for part in parts if part[0] != "text_encoders.clip_l.transformer.text_projection.weight"], path
    )


def unet(network: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
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


def vae(network: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    count = len(network.config.block_out_channels)
    for name, tensor in network.state_dict().items():
        new = _renamed(name, VAE_NAMES)
        for i in range(count):
            new = new.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{count - 1 - i}.")
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # the original attention is made of 1x1 convolutions
        yield f"first_stage_model.{new.replace('resnets', 'block')}", tensor


def clip(encoder: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in encoder.state_dict().items():
        outside = name.startswith(("text_model.", "text_projection."))
        yield f"{prefix}{name if outside else 'text_model.' + name}", tensor


def open_clip(encoder: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    state = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    yield f"{prefix}positional_embedding", state["embeddings.position_embedding.weight"]
    yield f"{prefix}token_embedding.weight", state["embeddings.token_embedding.weight"]
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


def sd3_transformer(network: SD3Transformer2DModel) -> Iterator[tuple[str, Tensor]]:
    state, last = dict(network.state_dict()), len(network.transformer_blocks) - 1
    for block in range(last + 1):
        for side, names in (("x", "to_q to_k to_v"), ("context", "add_q_proj add_k_proj add_v_proj")):
            for kind in ("weight", "bias"):
                parts = [state.pop(f"transformer_blocks.{block}.attn.{name}.{kind}") for name in names.split()]
                yield f"model.diffusion_model.joint_blocks.{block}.{side}_block.attn.qkv.{kind}", torch.cat(parts)
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


def _write(parts: list[tuple[str, Tensor]], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in parts}, path)
    return path
