"""The noise levels of an update whose samples are all at one step."""

import torch

from flashdmd_ray.batch import NoiseLevels, Prompts


def levels(prompts: Prompts, step: int, low_noise: int | None = 249) -> NoiseLevels:
    return NoiseLevels(torch.full((len(prompts),), step), step, low_noise)
