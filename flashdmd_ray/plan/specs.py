"""Facts about each network and how a role uses it. A spec is plain JSON and says all that a cost depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from flashdmd_ray.catalog.families import MMDIT_KEYS, UNET_KEYS
from flashdmd_ray.config import Config, LoraConfig
from flashdmd_ray.plan.models import Models

Spec = dict[str, Any]

# Keys of a config.json that shape a network, with the value that stands for an absent one. Others say how it was trained or saved.
_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": None,
    "down_block_types": None,
    "up_block_types": None,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_SAM = {
    **dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads", "window_size", "global_attn_indexes")),
    "prompt_dim": 256,
}


def _shape(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that shape a network and are not as usual, so that every way of writing one architecture reads the same."""
    chosen = {key: config.get(key, usual) for key, usual in keys.items()}
    return {key: value for key, value in chosen.items() if value is not None and value != keys[key]}


def key_of(spec: Spec) -> str:
    """A name for a spec that is the same everywhere."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def tokens_of(config: Config, models: Models) -> int | None:
    """Number of text tokens the denoiser reads; None when unknown."""
    lengths = [model.config.get("max_position_embeddings") for model in models.texts if model.config]
    known = [length for length in lengths if length]
    if len(lengths) < len(models.texts) or not known:
        return None
    return config.model.entry.text_tokens(int(known[0]), config.model.t5)


def _denoiser(config: Config, models: Models, dtype: str) -> Spec | None:
    tokens, network = tokens_of(config, models), models.denoiser.config
    if tokens is None or network is None or "_class_name" not in network or models.latent is None:
        return None
    family = config.model.family
    shape = _shape(network, config.model.entry.denoiser_keys)
    return {
        "kind": "denoiser",
        "family": family,
        "network": shape,
        "dtype": dtype,
        "latent": list(models.latent),
        "tokens": tokens,
    }


def teacher(config: Config, models: Models) -> Spec | None:
    """The frozen denoiser."""
    return _denoiser(config, models, config.model.dtype)


def trained(config: Config, models: Models, role: str) -> Spec | None:
    """The generator or the "score" estimator as its engine trains it."""
    mid = {"mid": True} if role == "score" and config.adversarial.space == "latent" else {}
    checkpointing = {"checkpointing": config.engine.gradient_checkpointing, **mid}
    if role in config.lora.networks:
        base = _denoiser(config, models, config.model.dtype)
        return base and base | checkpointing | {"lora": _lora(config.lora, config.engine.precision)}
    whole = _denoiser(config, models, config.engine.precision)
    return whole and whole | checkpointing


def _lora(lora: LoraConfig, dtype: str) -> Mapping[str, Any]:
    chosen = {"networks": ["generator"], "rank": lora.rank, "targets": lora.targets and list(lora.targets)}
    return {"config": chosen, "dtype": dtype}


def rollout(config: Config, models: Models) -> Spec | None:
    """The generator as the rollout workers hold it, in the precision that it is trained in."""
    if "generator" in config.lora.networks:
        return trained(config, models, "generator")
    return _denoiser(config, models, config.engine.precision)


def vae(config: Config, models: Models) -> Spec | None:
    """The frozen autoencoder; `checkpointing` is of its decoder where a gradient passes through it."""
    if models.vae.config is None or models.latent is None or models.image is None:
        return None
    return {
        "kind": "vae",
        "network": _shape(models.vae.config, _VAE),
        "dtype": config.model.dtype,
        "latent": list(models.latent),
        "image": list(models.image),
        "checkpointing": config.engine.gradient_checkpointing,
    }


def judge(config: Config, models: Models) -> Spec | None:
    """SAM and heads. The heads are float32 whatever the frozen networks are."""
    sam = models.sam
    if sam is None or sam.config is None or models.image is None:
        return None
    prompt_width = None
    if config.adversarial.prompt_projection:
        entry = config.model.entry
        configs = [
            text.config or {}
            for name, text in zip(entry.text_encoders, models.texts, strict=False)
            if name in entry.pooled_encoders
        ]
        prompt_width = sum(int(text["projection_dim"]) for text in configs)
    return {
        "kind": "judge",
        "network": _shape(sam.config, _SAM),
        "dtype": config.model.dtype,
        "image": list(models.image),
        "hidden": config.adversarial.hidden,
        "prompt_width": prompt_width,
        "checkpointing": config.engine.gradient_checkpointing,
    }


def latent_reward(config: Config, models: Models, label: str) -> Spec | None:
    """A latent reward model, in float32: the down and mid blocks of a U-Net, or the first blocks of a transformer."""
    saved, tokens = models.rewards[label].config, tokens_of(config, models)
    if saved is None or models.latent is None or tokens is None:
        return None
    if "transformer" in saved:
        form: Spec = {"family": config.model.family, "network": _shape(saved["transformer"], MMDIT_KEYS)}
    elif "unet" in saved:
        form = {"network": _shape(saved["unet"], UNET_KEYS), "text_width": saved["text_width"]}
    else:
        return None
    return {
        "kind": "latent_reward",
        **form,
        "dtype": "float32",
        "latent": list(models.latent),
        "tokens": tokens,
    }


def all_of(config: Config, models: Models) -> list[Spec]:
    """Everything that a plan looks up, each once."""
    found = [
        teacher(config, models),
        trained(config, models, "generator"),
        trained(config, models, "score"),
        vae(config, models),
        judge(config, models),
    ]
    if config.preference.updates:
        found.append(rollout(config, models))
        found += [
            latent_reward(config, models, reward.label) for reward in config.rewards if reward.entry.reads_latents
        ]
    return list({key_of(spec): spec for spec in found if spec is not None}.values())
