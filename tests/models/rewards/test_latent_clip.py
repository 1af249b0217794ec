"""The reward of kind latent_clip: its judge's own view of patches, its directory, its training, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashdmd_ray.config import ModelConfig, RewardConfig, parse_config, validated
from flashdmd_ray.demo.scenes import make_pool
from flashdmd_ray.losses.reward_model import stem_loss
from flashdmd_ray.models.reward_files import reward_files
from flashdmd_ray.models.rewards import build_reward
from flashdmd_ray.models.rewards.latent_clip import LatentClip, embed_patches
from flashdmd_ray.models.trial_loading import try_loading
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.reward_training.job import run_reward_training
from flashdmd_ray.roles.networks import load_parts
from flashdmd_ray.roles.reward import Reward

JUDGE = RewardConfig(kind="pickscore", path="demo")
VAE = {"scaling_factor": 1.0, "shift_factor": 0.0}


@pytest.fixture
def model() -> LatentClip:
    judge = build_reward("pickscore", "demo")
    torch.manual_seed(0)
    return LatentClip(judge, (3, 12, 12), 8)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_pool(4, "held_out", 5).batch(torch.arange(4))


def test_the_tower_sees_in_patches_what_the_judge_sees_in_the_image(model: LatentClip, images: torch.Tensor) -> None:
    patches, embeddings = model.targets(images)
    assert torch.equal(embeddings, embed_patches(model.judge.clip, patches))
    torch.testing.assert_close(embeddings, model.judge.features(images))
    texts = ["a red 4", "two 7s", "a blue 1", "a red 4"]
    rewards = model.judge.reward((embeddings * model.judge.text_features(texts)).sum(dim=-1))
    torch.testing.assert_close(rewards, model.judge.score(images, texts))
    assert stem_loss(patches, embeddings, patches, embeddings) < 1e-5


def test_what_is_saved_scores_alike_and_other_latents_are_refused(model: LatentClip, tmp_path: Path) -> None:
    model.save(tmp_path / "own", JUDGE, VAE)
    loaded = build_reward("latent_clip", str(tmp_path / "own"))
    family = load_parts(ModelConfig(), ("denoiser", "text"))
    noisy, timesteps, texts = torch.randn(3, 3, 12, 12), torch.tensor([999, 749, 249]), ["a red 4", "two 7s", "a red 4"]
    assert torch.equal(loaded.score(noisy, timesteps, texts, family), model.score(noisy, timesteps, texts, family))
    with pytest.raises(ValueError, match="another model family or resolution"):
        loaded.score(torch.randn(1, 3, 16, 16), timesteps[:1], texts[:1], family)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vae": {"scaling_factor": 0.13}}, "another VAE"),
        ({"kind": "hpsv2"}, "pickscore or clipscore"),
        ({"judge": "/nowhere"}, "/nowhere"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused_before_anything_is_loaded(
    model: LatentClip, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    model.save(tmp_path, JUDGE, VAE)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | change))
    config = parse_config({"rewards": [{"kind": "latent_clip", "path": str(tmp_path)}]})
    with pytest.raises(ValueError, match=says):
        reward_files(config)


def test_weights_of_another_stem_are_refused_by_a_dry_run(model: LatentClip, tmp_path: Path) -> None:
    model.save(tmp_path, JUDGE, VAE)
    config = parse_config({"rewards": [{"kind": "latent_clip", "path": str(tmp_path)}]})
    try_loading(config, config.rewards)
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weight"):
        try_loading(config, config.rewards)


def test_a_trained_stem_lowers_its_loss_and_is_a_reward_of_a_run(tmp_path: Path) -> None:
    config = validated(
        RewardTrainingConfig,
        {
            "runtime": "local",
            "steps": 10,
            "batch": 8,
            "run": {"name": "stem", "dir": str(tmp_path)},
            "latent_reward": {"form": "clip", "width": 8},
            "pairs": {"source": "demo", "labels": "rewards", "count": 24},
            "noise": "own",
            "timestep_range": [249, 749],
            "optimizer": {"lr": 3e-3},
            "accuracy": {"pairs": 4, "timesteps": [249]},
        },
    )
    assert run_reward_training(config) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "stem" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
    result = tmp_path / "stem" / "latent_reward"
    assert "kind: latent_clip" in (result / "README.md").read_text()
    shutil.rmtree(tmp_path / "stem" / "checkpoints")
    run = parse_config(
        {"rewards": [{"kind": "latent_clip", "path": str(result), "skip_noise_check": "hardly trained"}]}
    )
    assert reward_files(run)["latent_clip"].total > 0
    assert Reward.from_config(run).models["latent_clip"].latent == (3, 12, 12)
