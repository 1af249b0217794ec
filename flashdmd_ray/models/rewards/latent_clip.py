"""A CLIP reward that reads latents: PickScore's own tower behind a convolutional stem, without decoding an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from flashdmd_ray.config import RewardConfig
from flashdmd_ray.diffusion.schedule import NoiseSchedule
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.locations import fetch
from flashdmd_ray.models.reward_files import read_latent_clip
from flashdmd_ray.models.rewards.base import unique_rows
from flashdmd_ray.models.rewards.clip import CosineReward
from flashdmd_ray.models.state_dicts import assemble, read_weights
from flashdmd_ray.models.stock_modules import load_part
from flashdmd_ray.models.weight_files import TRANSFORMERS, weight_files

WEIGHTS_FILE = "model.safetensors"


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden)


class LatentClip(NoisyLatentReward):
    """reward = the judge's, for example exp(logit_scale) cos(image, text), with image made of latents:

        x0_hat = the frozen teacher's estimate of the clean latent,   image = tower(stem(x0_hat)).

    The stem stands for VAE decoder, resizing and patch embedding: it is trained to give the tower the patches of the decoded image. Tower
    and text encoder are the judge's own. A candidate of a preference update shares its x0 with its group and differs in noise only: what
    becomes of it is what the teacher makes of that noise, and the estimate shows it.
    """

    parts = ("denoiser", "text")

    def __init__(self, judge: CosineReward, latent: tuple[int, int, int], width: int) -> None:
        """An untrained stem for latents of shape (C, h, w).

        width: its channels, a multiple of 8. Raises ValueError when the tower's patches do not divide the latents.
        """
        super().__init__()
        vision = judge.clip.config.vision_config
        side = vision.image_size // vision.patch_size
        channels, height, wide = latent
        if height != wide or height % side:
            raise ValueError(
                f"latents of {height} x {wide} cannot be cut into the {side} x {side} patches of the reward's tower; choose another "
                "model.resolution or another reward"
            )
        self.judge, self.latent, self.width = judge.requires_grad_(False), latent, width
        patch = height // side
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            ResidualBlock(width),
            ResidualBlock(width),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, vision.hidden_size, patch, patch),
        )

    @classmethod
    def from_config(cls, settings: RewardConfig) -> Self:
        """Read what `save` wrote and the judge that it names. Raises ValueError, one line, for a path with anything else."""
        from flashdmd_ray.models.rewards import reward_model

        path, fetched = settings.path, TRANSFORMERS
        root = load_part(path, "", lambda: fetch(path, "", lambda folder: weight_files(folder, fetched), fetched))
        saved = load_part(path, "", lambda: read_latent_clip(root))
        judge = reward_model(
            RewardConfig(kind=saved["kind"], path=saved["judge"], base=saved.get("base"), dtype=settings.dtype)
        )
        assert isinstance(judge, CosineReward), "read_latent_clip takes no other kind"
        model, weights = cls(judge, tuple(saved["latent"]), saved["width"]), read_weights(root / WEIGHTS_FILE)
        model.stem = assemble(lambda: cls(judge, model.latent, model.width).stem, weights, path, judge.clip.dtype)
        return model

    def save(self, path: Path, judge: RewardConfig, vae: dict[str, float]) -> None:
        """Write config.json, which names the judge, and the stem. vae: scale and shift of the latents' VAE."""
        path.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {
            "kind": judge.kind,
            "judge": _found_from_anywhere(judge.path),
            "base": None if judge.base is None else _found_from_anywhere(judge.base),
            "latent": list(self.latent),
            "width": self.width,
            "vae": vae,
        }
        (path / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in self.stem.state_dict().items()},
            path / WEIGHTS_FILE,
        )
        (path / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files for their owner only

    def forward(self, estimates: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, D, g, g) that the tower gets, and embeddings float32 (B, F) of unit length, of clean latents float (B, C, h, w)."""
        patches = self.stem(estimates.to(self.judge.clip.dtype))
        return patches, embed_patches(self.judge.clip, patches)

    @torch.no_grad()
    def score(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], family: Family) -> Tensor:
        """See `NoisyLatentReward.score`."""
        if noisy.shape[1:] != self.latent:
            raise ValueError(
                f"the latent reward reads latents of shape {self.latent}, these have {tuple(noisy.shape[1:])}: it was made for another "
                "model family or resolution"
            )
        _, images = self(estimate(family.teacher, family.schedule, noisy, timesteps, family.encode(texts)))
        unique, rows = unique_rows(texts, images.device)
        return self.judge.reward((images * self.judge.text_features(unique)[rows]).sum(dim=-1))

    @torch.no_grad()
    def targets(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The tower's own view of images float (B, 3, H, W) in [-1, 1]: what `forward` is to give for their latents."""
        clip = self.judge.clip
        patches = clip.vision_model.embeddings.patch_embedding(self.judge.pixels(images))
        return patches, embed_patches(clip, patches)


def _found_from_anywhere(path: str) -> str:
    """A path on this machine as an absolute one; a hub id or 'demo' as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


@torch.no_grad()
def estimate(
    teacher: nn.Module, schedule: NoiseSchedule, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    """The teacher's estimate of the clean latents float32 (B, C, h, w), without guidance."""
    return schedule.to_x0(teacher(noisy, schedule.network_timestep(timesteps), conditioning), noisy, timesteps)


def embed_patches(clip: CLIPModel, patches: Tensor) -> Tensor:
    """Image embeddings float32 (B, F) of unit length of a vision tower's patches (B, D, g, g)."""
    vision = clip.vision_model
    tokens = patches.flatten(2).transpose(1, 2)
    first = vision.embeddings.class_embedding.expand(len(tokens), 1, -1)
    hidden = torch.cat([first, tokens], dim=1) + vision.embeddings.position_embedding.weight
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(clip.visual_projection(vision.post_layernorm(hidden[:, 0])).float(), dim=-1)
