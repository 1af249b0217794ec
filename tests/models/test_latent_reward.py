"""The latent reward model on U-Nets of several forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from flashdmd_ray.models.latent_reward import LatentRewardModel

_TEXT, _POOLED = 12, 10


def _unet(channels: tuple[int, ...], layers: int) -> UNet2DConditionModel:
    torch.manual_seed(0)
    deep = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * deep),
        up_block_types=(*["CrossAttnUpBlock2D"] * deep, "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=_TEXT,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + _POOLED,
    )


def _inputs(count: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.tensor([999, 499, 1])[:count],
        torch.randn(count, 5, _TEXT, generator=generator),
        torch.randn(count, _POOLED, generator=generator),
        torch.full((count, 6), 64.0),
    )


@pytest.mark.parametrize(("channels", "layers"), [((8, 16), 1), ((8, 16, 24), 2)])
def test_features_are_those_of_the_whole_unet(channels: tuple[int, ...], layers: int) -> None:
    unet = _unet(channels, layers).eval()
    model = LatentRewardModel.from_unet(unet, _POOLED).eval()
    latents, times, states, pooled, time_ids = _inputs()
    seen: list[torch.Tensor] = []
    for block in unet.down_blocks:
        last = block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1]
        last.register_forward_hook(lambda module, args, output: seen.append(getattr(output, "sample", output)))
    unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        unet(latents, times, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids})
        seen = [value[0] if isinstance(value, tuple) else value for value in seen]
        features = torch.cat([value.mean(dim=(2, 3)) for value in seen], dim=1)
        assert features.shape[1] == sum(channels) + channels[-1]
        expected = model.logit_scale.exp() * F.cosine_similarity(model.visual_projection(features), pooled)
        torch.testing.assert_close(model(*_inputs()), expected)


def test_up_blocks_are_not_kept() -> None:
    model = LatentRewardModel.from_unet(_unet((8, 16), 1), _POOLED)
    assert not [name for name in model.state_dict() if "up_blocks" in name or "conv_out" in name]


def test_scores_are_per_sample_and_differentiable() -> None:
    model = LatentRewardModel.from_unet(_unet((8, 16), 1), _POOLED).eval()
    inputs = _inputs()
    one = torch.cat([model(*(part[row : row + 1] for part in inputs)) for row in range(3)])
    torch.testing.assert_close(model(*inputs), one)
    latents = inputs[0].requires_grad_()
    model(latents, *inputs[1:]).sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("shared", [True, False])
def test_saved_and_loaded_scores_are_equal(tmp_path, shared: bool) -> None:
    unet = _unet((8, 16), 1)
    unet.save_pretrained(tmp_path / "teacher" / "unet")
    model = LatentRewardModel.from_unet(unet, _POOLED).eval()
    with torch.no_grad():
        model.unet.mid_block.resnets[0].conv1.weight.add_(0.1)
    home = tmp_path / "latent_reward"
    model.save_pretrained(home, base_unet=tmp_path / "teacher" / "unet" if shared else None)
    assert torch.equal(LatentRewardModel.from_pretrained(home).eval()(*_inputs()), model(*_inputs()))
    if shared:
        (tmp_path / "teacher").rename(tmp_path / "gone")
        with pytest.raises(ValueError, match="not a complete latent reward model"):
            LatentRewardModel.from_pretrained(home)


def test_not_a_model_directory_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        LatentRewardModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold"):
        LatentRewardModel.from_pretrained(tmp_path)
