"""The score estimator's one objective: denoise the generator's samples."""

from __future__ import annotations

from torch import Tensor

from flashdmd_ray.diffusion.schedule import upcast


def denoising_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """mean_B w_b mean_CHW (prediction - target)^2, a float32 scalar; weights (B,) are 1 when None.

    prediction and target, (B, C, h, w), are in one parameterisation: the network's own (`NoiseSchedule.target`) or x0. A sample that
    only pads a batch has weight 0; the mean is over all B, so that shards of equal size average to the global loss.
    """
    assert prediction.shape == target.shape, f"prediction {tuple(prediction.shape)} for target {tuple(target.shape)}"
    per_sample = (upcast(prediction) - upcast(target)).square().flatten(1).mean(dim=1)
    return per_sample.mean() if weights is None else (weights * per_sample).mean()
