"""What the roles of one process share: the loaded teacher family and a denoiser bound to its prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from flashdmd_ray.batch import Prompts, noise
from flashdmd_ray.checkpoint import save_tensors
from flashdmd_ray.config import ModelConfig
from flashdmd_ray.demo import weights_path
from flashdmd_ray.diffusion.sampling import PredictX0
from flashdmd_ray.diffusion.schedule import NoiseSchedule
from flashdmd_ray.models.denoiser import Conditioning
from flashdmd_ray.models.sdxl import SDXL


def resolve(path: str, part: str) -> str:
    """'demo' means the weights in the package; anything else is a directory, file or hub id of the user's."""
    return str(weights_path(part)) if path == "demo" else path


@lru_cache(maxsize=1)
def load_family(model: ModelConfig) -> SDXL:
    """The frozen teacher family, loaded once per process and shared by the roles in it."""
    return SDXL.from_pretrained(resolve(model.teacher, "teacher"))


def bind(network: Callable[..., Tensor], schedule: NoiseSchedule, conditioning: Conditioning) -> PredictX0:
    """A network as the objectives see it: (noisy latents, timesteps) -> x0, for these prompts."""

    def predict_x0(noisy: Tensor, timesteps: Tensor) -> Tensor:
        prediction = network(noisy, schedule.network_timestep(timesteps), conditioning)
        return schedule.to_x0(prediction, noisy, timesteps)

    return predict_x0


def frozen(predict_x0: PredictX0) -> PredictX0:
    """The same prediction outside autograd."""

    @torch.no_grad()
    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return predict_x0(noisy, timesteps)

    return predict


def noise_stream(prompts: Prompts, shape: tuple[int, ...], seed: int, stream: str) -> Callable[[int], Tensor]:
    """draw(k): the k-th fresh noise of a sampling run, float32 (B, *shape)."""
    return lambda hop: noise(prompts.indices, shape, seed, f"{stream}/{hop}")


def full(timestep: int, like: Tensor) -> Tensor:
    """`timestep` for every sample of `like`, int64 (B,)."""
    return torch.full((len(like),), timestep, dtype=torch.int64, device=like.device)


def save_shared(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what all ranks of a group hold alike: rank 0 does. (Collecting it was the collective part.)"""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_tensors(path, tensors)


Metrics = dict[str, float]
