"""Latent rewards in LPO's published layout, against stock U-Nets with hooks, and name for name against the published directories."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from flashdmd_ray.demo import weights_path
from flashdmd_ray.models.latent_reward import LPOReward
from flashdmd_ray.models.latent_reward.lpo import flat
from flashdmd_ray.models.reward_files import is_lpo
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.sd15 import SD15
from flashdmd_ray.models.sdxl import SDXL
from flashdmd_ray.models.state_dicts import assemble
from tests.models.rewards.record_layouts import read, state_of
from tests.tiny import sd15_pipeline, sdxl_pipeline

FAMILIES = {"sdxl": (SDXL, sdxl_pipeline, 16), "sd15": (SD15, sd15_pipeline, 8)}
TEXTS = ["a red 4", "", "two blue 7s left of a cup that goes on"]


def write(path, family):
    """A tuned model as LPO's `save` writes it, and the pipeline it was made from, whose text encoders differ."""
    _, pipeline, width = FAMILIES[family]
    tuned = pipeline(seed=1)
    pipeline().save_pretrained(path / "base")
    tuned.unet.save_pretrained(path / "lrm" / "unet")
    tuned.text_encoder.save_pretrained(path / "lrm" / "text_encoder")
    generator = torch.Generator().manual_seed(2)
    features = sum(tuned.unet.config.block_out_channels) + tuned.unet.config.block_out_channels[-1]
    nested = {"visual_projection": {"weight": torch.randn(width, features, generator=generator)}}
    nested["logit_scale"] = torch.tensor(2.0)
    if family == "sdxl":
        tuned.text_encoder_2.save_pretrained(path / "lrm" / "text_encoder_2")
    else:
        nested["text_projection"] = {"weight": torch.randn(width, width, generator=generator)}
    as_number = {"logit_scale": 2.0} if family == "sd15" else {}  # as LPO's training code saves it
    torch.save(nested | as_number, path / "lrm" / "state_dict.pt")
    return tuned, nested


def expected(tuned, nested, family, latents, timesteps, text):
    """One latent and prompt: whole stock networks, features by hooks, guidance 7.5 on the mid block's."""

    def encode(words):
        ids = tuned.tokenizer(
            words, padding="max_length", max_length=12, truncation=True, return_tensors="pt"
        ).input_ids
        one = tuned.text_encoder(ids, output_hidden_states=True)
        if family == "sd15":
            return one.last_hidden_state, one.pooler_output, None
        two = tuned.text_encoder_2(ids, output_hidden_states=True)
        added = {"text_embeds": two.text_embeds, "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])}
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds, added

    def features(words):
        seen = []
        hooks = [
            (block.attentions if hasattr(block, "attentions") else block.resnets)[-1].register_forward_hook(
                lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
            for block in tuned.unet.down_blocks
        ]
        hooks.append(tuned.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output)))
        tokens, pooled, added = encode(words)
        tuned.unet(latents, timesteps, tokens, added_cond_kwargs=added)
        for hook in hooks:
            hook.remove()
        maps = [getattr(value, "sample", value) for value in seen]
        return [value.mean(dim=(2, 3)) for value in maps], pooled

    conditional, pooled = features(text)
    empty, _ = features("")
    mid = empty[-1] + 7.5 * (conditional[-1] - empty[-1])
    image = torch.cat([*conditional[:-1], mid], dim=1) @ nested["visual_projection"]["weight"].T
    if family == "sd15":
        pooled = pooled @ nested["text_projection"]["weight"].T
    return nested["logit_scale"].exp() * F.cosine_similarity(image, pooled)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_it_is_the_published_model(family, tmp_path):
    tuned, nested = write(tmp_path, family)
    assert is_lpo(str(tmp_path / "lrm"))
    reward = build_reward("latent", str(tmp_path / "lrm"), base=str(tmp_path / "base"))
    assert isinstance(reward, LPOReward)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not [name for name in reward.state_dict() if "up_blocks" in name or "conv_out" in name]
    own = FAMILIES[family][0].from_pretrained(str(tmp_path / "base"), parts=())
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([999, 749, 1])
    with torch.no_grad():
        found = reward.score(latents, timesteps, TEXTS, own)
        for row in range(3):
            one = expected(tuned, nested, family, latents[row : row + 1], timesteps[row : row + 1], TEXTS[row])
            torch.testing.assert_close(found[row : row + 1], one, rtol=1e-4, atol=1e-4)
    if family == "sd15":
        another = SDXL.from_pretrained(str(weights_path("teacher")), parts=())
        with pytest.raises(ValueError, match="reads latents of family 'sd15', these are of 'sdxl'"):
            reward.score(latents, timesteps, TEXTS, another)


def test_what_is_wrong_with_a_directory_is_one_line(tmp_path):
    write(tmp_path, "sd15")
    home, base = tmp_path / "lrm", str(tmp_path / "base")
    weights = home / "unet" / "diffusion_pytorch_model.safetensors"
    names = load_file(weights)
    assert "up_blocks.0.resnets.0.conv1.weight" in names, "the whole network is published"
    weights.unlink()
    with pytest.raises(ValueError, match=r"unet has no \.safetensors file; download the weights"):
        build_reward("latent", str(home), base=base)
    torch.save({"logit_scale": torch.tensor(1.0)}, home / "state_dict.pt")
    with pytest.raises(ValueError, match=r"state_dict\.pt is not that of a published latent reward"):
        build_reward("latent", str(home), base=base)
    torch.save(torch.nn.Linear(2, 2), home / "state_dict.pt")
    with pytest.raises(ValueError, match=r"cannot load the model from .*state_dict\.pt"):
        build_reward("latent", str(home), base=base)


@pytest.mark.parametrize(("name", "features", "text"), [("lrm_sdxl", 3520, 1280), ("lrm_sd15", 4800, 768)])
def test_names_and_shapes_are_those_of_the_published_directories(name, features, text):
    layout = read()[name]
    state = state_of(layout["state_dict.pt"]) | {
        f"unet.{key}": value for key, value in state_of(layout["unet"]).items()
    }
    assert state["visual_projection.weight"].shape == (text, features)
    used = {
        key: value
        for key, value in state.items()
        if not key.startswith(("unet.up_blocks", "unet.conv_norm_out", "unet.conv_out"))
    }
    assert len(used) < len(state)
    reward = assemble(lambda: LPOReward(layout["config"], text), used, name, torch.float32)
    assert sum(parameter.numel() for parameter in reward.parameters()) > 300_000_000
    assert flat({"visual_projection": {"weight": state["visual_projection.weight"]}}).keys() == {
        "visual_projection.weight"
    }
