"""Result of the training: the model as a directory that a run loads, its figures and its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdmd_ray.models.latent_reward import LatentRewardModel, NoisyLatentReward, save_latent_reward
from flashdmd_ray.models.rewards.latent_clip import LatentClip
from flashdmd_ray.models.teacher_files import part_config
from flashdmd_ray.reward_training.accuracy import table
from flashdmd_ray.reward_training.config import RewardTrainingConfig
from flashdmd_ray.run.files import new_folder
from flashdmd_ray.run.versions import software_versions

FOLDER, ACCURACY, CARD = "latent_reward", "accuracy.json", "README.md"


def save_result(
    folder: Path,
    config: RewardTrainingConfig,
    model: NoisyLatentReward,
    masters: Mapping[str, Tensor],
    report: Mapping[str, Any],
    steps: int,
) -> Path:
    """Write `folder`/latent_reward in one rename; returns it. masters: the trained weights in float32."""
    final = folder / FOLDER
    model = model.float()
    model.load_state_dict(dict(masters), strict=False)
    with new_folder(final) as unfinished:
        _save(model, unfinished, config)
        (unfinished / ACCURACY).write_text(json.dumps({"steps": steps, **report}, indent=1) + "\n")
        (unfinished / CARD).write_text("\n".join(card(config, model, report, steps, final)) + "\n", encoding="utf-8")
    return final


def _save(model: NoisyLatentReward, path: Path, config: RewardTrainingConfig) -> None:
    if isinstance(model, LatentRewardModel):
        save_latent_reward(model, path)
        return
    assert isinstance(model, LatentClip)
    (judge,) = [reward for reward in config.rewards if not reward.held_out]
    vae = part_config(config, "vae") or {}
    kept = {name: float(vae[name]) for name in ("scaling_factor", "shift_factor") if vae.get(name) is not None}
    model.save(path, judge, kept)


def card(
    config: RewardTrainingConfig, model: NoisyLatentReward, report: Mapping[str, Any], steps: int, path: Path
) -> Sequence[str]:
    """The model card: what it is, how to use it, what was measured, what it was made with."""
    pairs, optimizer, versions = config.pairs, config.optimizer, software_versions()
    labels = "the labels of the source" if pairs.labels == "given" else f"the verdicts of {', '.join(_judges(config))}"
    parameters = sum(p.numel() for p in model.parameters())
    trained = "all trained" if config.latent_reward.train == "all" else "the last part trained"
    used = ", ".join(f"{name} {versions[name]}" for name in ("flashdmd-ray", "torch", "diffusers"))
    return [
        "---",
        "library_name: flashdmd_ray",
        "tags: [reward-model, latent-reward, diffusion]",
        "---",
        f"# Latent reward for {config.model.family}, made of {config.model.teacher}",
        "",
        "Scores noisy latents at any timestep against a prompt, without decoding them: higher is better, comparable only between",
        f"latents of one prompt and one timestep. {parameters:,} parameters, {trained}.",
        "",
        "```yaml",
        "rewards:",
        f"  - {{kind: {'latent' if config.latent_reward.form == 'blocks' else 'latent_clip'}, path: {path}}}",
        "```",
        "",
        "## Measured",
        *table(report),
        "",
        "Brackets are 95 % Wilson intervals; a star is above chance with 99 % confidence. Candidates of a run have noise of their own.",
        "",
        "## Made with",
        f"- {steps:,} updates of {config.batch} pairs from `{pairs.source}` with {labels}, seed {config.seed}",
        f"- AdamW at {optimizer.lr:g} ({optimizer.schedule}), average {config.ema:g}",
        f"- {config.noise} noise, timesteps {config.timestep_range[0]} to {config.timestep_range[1]}",
        f"- {used}, commit {versions['commit']}",
        "",
        "It can be no better than its labels, and it was measured on pairs of the same source only.",
    ]


def _judges(config: RewardTrainingConfig) -> list[str]:
    return [reward.label for reward in config.rewards if not reward.held_out]
