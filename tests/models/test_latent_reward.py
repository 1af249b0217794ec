"""Latent reward models of every family: features of the whole network, text, gradients, timesteps, directories."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from flashdmd_ray.catalog.families import FAMILIES
from flashdmd_ray.models import family_class
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import (
    LatentRewardModel,
    MMDiTLatentReward,
    UNetLatentReward,
    latent_reward_of,
    load_latent_reward,
    save_latent_reward,
)
from flashdmd_ray.models.latent_reward.mmdit import read_after
from tests.tiny import save_sd3, save_sd15, save_sdxl

TEXTS = ["a red 4", "two 7s", "a much longer prompt"]
CASES = {
    "sdxl": ("sdxl", save_sdxl, {}),
    "sd15": ("sd15", save_sd15, {}),
    "sd3": ("sd3", save_sd3, {}),
    "sd3.5": ("sd3", save_sd3, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 2), "num_layers": 5}),
}


@dataclass(frozen=True)
class Case:
    """A family, loaded from `path`, its latent reward, and noisy latents with their conditioning."""

    path: str
    family: Family
    model: LatentRewardModel
    noisy: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Conditioning


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> Case:
    name, save, arguments = CASES[request.param]
    path = save(tmp_path_factory.mktemp("models") / name, **arguments)
    family = family_class(name).from_pretrained(str(path), parts=["denoiser", "text"])
    torch.manual_seed(1)
    model = latent_reward_of(family).eval()
    noisy = torch.randn(3, *family.latent_shape, generator=torch.Generator().manual_seed(2))
    return Case(str(path), family, model, noisy, torch.tensor([999, 499, 1]), family.encode(TEXTS))


def rewards_of(case: Case, model: LatentRewardModel | None = None) -> torch.Tensor:
    with torch.no_grad():
        return (model or case.model).score(case.noisy, case.timesteps, TEXTS, case.family)


def test_features_are_those_of_the_whole_network(case: Case) -> None:
    seen: list[torch.Tensor] = []
    network, hooks = case.family.teacher.network, []
    if isinstance(case.model, MMDiTLatentReward):
        kept = len(case.model.transformer.transformer_blocks)
        assert kept == (len(network.transformer_blocks) + 1) // 2
        modules = [network.transformer_blocks[number] for number in read_after(kept)]
    else:
        last = [
            block.attentions[-1] if hasattr(block, "attentions") else block.resnets[-1] for block in network.down_blocks
        ]
        modules = [*last, network.mid_block]
    for module in modules:
        hooks.append(module.register_forward_hook(lambda module, args, output: seen.append(output)))
    times = case.family.schedule.network_timestep(case.timesteps)
    with torch.no_grad():
        case.family.teacher(case.noisy, times, case.conditioning)
    for hook in hooks:
        hook.remove()
    if isinstance(case.model, MMDiTLatentReward):
        pooled = [F.layer_norm(image, image.shape[-1:], eps=1e-6).mean(dim=1) for _, image in seen]
    else:
        maps = [getattr(value, "sample", value) for value in seen]
        pooled = [(value[0] if isinstance(value, tuple) else value).mean(dim=(2, 3)) for value in maps]
    model, text = case.model, case.conditioning.pooled
    if model.text_projection is not None:
        text = case.conditioning.prompt_embeds[:, -1] @ model.text_projection.weight.T
    image = torch.cat(pooled, dim=1) @ model.visual_projection.weight.T
    expected = model.logit_scale.exp() * F.cosine_similarity(image, text)
    torch.testing.assert_close(rewards_of(case), expected.detach(), rtol=1e-4, atol=1e-5)


def test_every_kept_weight_has_a_gradient_and_so_have_the_latents(case: Case) -> None:
    noisy = case.noisy.clone().requires_grad_()
    case.model.score(noisy, case.timesteps, TEXTS, case.family).square().sum().backward()
    assert noisy.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    without = {name for name, p in case.model.named_parameters() if p.grad is None}
    case.model.zero_grad(set_to_none=True)
    assert without == set()


def test_rewards_read_the_timestep_and_the_text_and_are_per_sample(case: Case) -> None:
    rewards = rewards_of(case)
    with torch.no_grad():
        other_time = case.model.score(case.noisy, torch.tensor([249, 249, 249]), TEXTS, case.family)
        other_text = case.model.score(case.noisy, case.timesteps, TEXTS[1:] + TEXTS[:1], case.family)
        rows = [
            case.model.score(case.noisy[i : i + 1], case.timesteps[i : i + 1], TEXTS[i : i + 1], case.family)
            for i in range(3)
        ]
    assert (other_time - rewards).abs().min() > 1e-6
    assert (other_text - rewards).abs().min() > 1e-6
    torch.testing.assert_close(torch.cat(rows), rewards, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded_models_are_equal_to_the_bit(case: Case, tmp_path, shared: bool) -> None:
    folder = FAMILIES[case.family.name].denoiser
    base = tmp_path / "teacher" / folder
    case.family.teacher.network.save_pretrained(base)
    with torch.no_grad():
        next(case.model.get_submodule(case.model.last_part).parameters()).add_(0.1)
    save_latent_reward(case.model, tmp_path / "reward", base=base if shared else None)
    assert torch.equal(rewards_of(case, load_latent_reward(tmp_path / "reward").eval()), rewards_of(case))
    size = (tmp_path / "reward" / "model.safetensors").stat().st_size
    whole = 4 * sum(p.numel() for p in case.model.parameters())
    assert size < 0.9 * whole if shared else size >= whole
    if shared:
        (tmp_path / "teacher").rename(tmp_path / "gone")
        with pytest.raises(ValueError, match="not a complete latent reward model"):
            load_latent_reward(tmp_path / "reward")


def test_checkpointed_blocks_give_the_same_gradient(case: Case) -> None:
    def gradient() -> torch.Tensor:
        case.model.zero_grad(set_to_none=True)
        case.model.train().score(case.noisy, case.timesteps, TEXTS, case.family).sum().backward()
        found = case.model.get_submodule(case.model.last_part)
        return torch.cat([p.grad.flatten() for p in found.parameters()])

    plain = gradient()
    case.model.network.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)
    case.model.network.disable_gradient_checkpointing()
    case.model.eval()


def test_nothing_is_kept_that_no_reward_needs(case: Case) -> None:
    unused = ("up_blocks", "conv_out", "norm_out", "proj_out")
    assert not {name.split(".")[1] for name in case.model.state_dict() if "." in name} & set(unused)
    assert isinstance(case.model, MMDiTLatentReward if case.family.name == "sd3" else UNetLatentReward)


def test_latents_of_another_family_are_refused_in_one_line(case: Case) -> None:
    with pytest.raises(ValueError, match="made for another model family"):
        case.model.score(torch.zeros(3, 7, 8, 8), case.timesteps, TEXTS, case.family)


@pytest.mark.parametrize(
    ("blocks", "read"), [(1, (0,)), (3, (0, 1, 2)), (4, (0, 1, 2, 3)), (12, (2, 5, 8, 11)), (19, (3, 8, 13, 18))]
)
def test_blocks_that_are_read_are_evenly_spaced_and_end_with_the_last(blocks: int, read: tuple[int, ...]) -> None:
    assert read_after(blocks) == read


def test_a_number_of_blocks_that_is_not_there_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"choose 1 to|leave null"):
        latent_reward_of(case.family, 9)


def test_not_a_model_directory_is_one_line(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_latent_reward(tmp_path)
    for text in ("{}", "[]", '{"unet": 3, "text_width": 3}', '{"transformer": 3}', "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"does not hold|not a complete") as caught:
            load_latent_reward(tmp_path)
        assert "\n" not in str(caught.value)
