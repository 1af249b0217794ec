"""Parts of the demo beside a teacher that is not the demo's: refused, with the published names. Imports no torch."""

from __future__ import annotations

from flashdmd_ray.catalog.rewards import REWARDS
from flashdmd_ray.config import Config
from flashdmd_ray.demo import weights_path
from flashdmd_ray.models.config_files import read_json
from flashdmd_ray.models.teacher_files import NamesModels, part_config

_WORLD = ("in_channels", "sample_size", "cross_attention_dim", "joint_attention_dim")
"""Keys of a denoiser's config.json by which a copy or a student of the demo's teacher is told from other models."""


def refuse_demo_parts(config: Config) -> None:
    """Raises ValueError, one line for each, when data, SAM, rewards or the run's name are the demo's and the teacher is another one."""
    if is_demo_world(config):
        return
    lines = []
    if config.data.source == "demo":
        lines.append(
            "data.source: the packaged digit scenes are pictures of the demo's 24-pixel world; name captioned images, such as a folder "
            "or hf:owner/name (docs/data.md)"
        )
    if config.model.sam == "demo" and config.adversarial.space == "pixel":
        lines.append(
            "model.sam: the packaged Segment Anything knows the demo's 24-pixel scenes only; name a published checkpoint, "
            "such as sam_vit_b_01ec64.pth"
        )
    lines += demo_rewards(config) if config.preference.updates else []
    if config.run.name == "demo":
        lines.append("run.name: 'demo' is the run of the packaged teacher; give this run a name of its own")
    if lines:
        raise ValueError("\n".join(lines))


def demo_rewards(config: NamesModels) -> list[str]:
    """One line for each reward that is the demo's."""
    return [
        f"rewards.{index}.path: the packaged reward of kind '{reward.kind}' knows the demo's scenes only; name published weights, "
        f"such as {REWARDS[reward.kind].path}"
        for index, reward in enumerate(config.rewards)
        if reward.path == "demo"
    ]


def is_demo_world(config: NamesModels) -> bool:
    """True when the teacher is the demo's, or a model of the same latents and texts, such as a student of it."""
    entry = config.model.entry
    if config.model.teacher == "demo":
        return True
    denoiser = part_config(config, entry.denoiser)
    if denoiser is None or entry.demo is None:
        return False
    demo = read_json(weights_path(entry.demo) / entry.denoiser / "config.json")
    return all(denoiser.get(key) == demo.get(key) for key in _WORLD)
