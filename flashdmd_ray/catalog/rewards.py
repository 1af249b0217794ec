"""Rewards by kind, and what is known of each without loading it. A built-in reward is one row here and one file in models/rewards/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flashdmd_ray.catalog import published

PathRule = Literal["weights", "url", "class"]


@dataclass(frozen=True)
class RewardEntry:
    """One kind of reward. Everything that other packages must know of it is a field, so that none compares names."""

    loader: str
    """module:function that makes the reward from its `RewardConfig`."""
    path: str
    """Its published weights as `rewards.N.path`; for a server or a class an example."""
    path_is: PathRule = "weights"
    """weights: a directory, hub id or file. url: a server's address. class: package.module:Class of the user's."""
    base: str | None = None
    """Hub id of what the published weights are used with, as tokenizer and image processor; None when they need nothing."""
    optional_base: bool = False
    """Whether `base` may be given although the published weights need none."""
    files: tuple[str, ...] = ()
    """Names of its weights file in a directory or repository, the published one first; empty for a directory of a whole model."""
    model: published.Model | None = None
    """Size of all that is loaded; None when `path` decides."""
    demo: str | None = None
    """Part of the demo weights; None when there is none."""
    reads_latents: bool = False
    """Whether it judges noisy latents instead of decoded images."""
    reads_estimates: bool = False
    """True for a reward of the teacher's estimates of clean latents, whose workers hold the teacher."""


_CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_CLIP_LARGE = "openai/clip-vit-large-patch14"
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_config.json")
"""Weights and architecture in open_clip's own directory format."""

REWARDS: Mapping[str, RewardEntry] = {
    "pickscore": RewardEntry(
        "flashdmd_ray.models.rewards.clip:PickScore.from_config",
        "yuvalkirstain/PickScore_v1",
        base=_CLIP_H,
        demo="reward",
    ),
    "hpsv2": RewardEntry(
        "flashdmd_ray.models.rewards.hpsv2:HPSv2.from_config",
        "xswu/HPSv2",
        files=("HPS_v2_compressed.pt", OPEN_CLIP_FILES[0]),
        model=published.PICKSCORE,
    ),
    "hpsv2.1": RewardEntry(
        "flashdmd_ray.models.rewards.hpsv2:HPSv2.from_config",
        "xswu/HPSv2",
        files=("HPS_v2.1_compressed.pt", OPEN_CLIP_FILES[0]),
        model=published.PICKSCORE,
    ),
    "imagereward": RewardEntry(
        "flashdmd_ray.models.rewards.imagereward:ImageReward.from_config",
        "THUDM/ImageReward",
        base="google-bert/bert-base-uncased",
        files=("ImageReward.pt", "ImageReward.safetensors", "model.safetensors"),
        model=published.IMAGEREWARD,
    ),
    "clipscore": RewardEntry(
        "flashdmd_ray.models.rewards.clip:ClipScore.from_config",
        _CLIP_LARGE,
        base=_CLIP_LARGE,
    ),
    "aesthetic": RewardEntry(
        "flashdmd_ray.models.rewards.aesthetic:Aesthetic.from_config",
        "models/sac+logos+ava1-l14-linearMSE.pth",
        base=_CLIP_LARGE,
        files=("sac+logos+ava1-l14-linearMSE.pth",),
        model=published.AESTHETIC,
    ),
    "mps": RewardEntry(
        "flashdmd_ray.models.rewards.mps:MPS.from_config",
        "RE-N-Y/mpsv1",
        base=_CLIP_H,
        files=("model.safetensors", "MPS_overall_checkpoint.safetensors"),
        model=published.MPS,
    ),
    "latent": RewardEntry(
        "flashdmd_ray.models.latent_reward:reward_from_config",
        "casiatao/LRM/lrm_sdxl",
        demo="latent_reward",
        optional_base=True,
        reads_latents=True,
    ),
    "latent_clip": RewardEntry(
        "flashdmd_ray.models.rewards.latent_clip:LatentClip.from_config",
        "runs/latent_clip/latent_reward",
        demo="latent_clip",
        reads_latents=True,
        reads_estimates=True,
    ),
    "remote": RewardEntry(
        "flashdmd_ray.models.rewards.remote:Remote.from_config", "http://127.0.0.1:8100/score", path_is="url"
    ),
    "custom": RewardEntry(
        "flashdmd_ray.models.rewards.custom:Custom.from_config", "my_package.rewards:Brightness", path_is="class"
    ),
}
"""Rewards by `rewards.N.kind`."""


def kind_of_file(name: str) -> str | None:
    """The kind whose published weights file is called so; None when no one kind owns the name."""
    if name == "model.safetensors":
        return None
    return next((kind for kind, entry in REWARDS.items() if name in entry.files[:1]), None)


def is_published(hub_id: str) -> bool:
    """Return True if the sizes of that hub repository are in the catalogue, so that it can be planned without a download."""
    return hub_id in published.IDS or any(hub_id in (entry.path, entry.base) for entry in REWARDS.values())
