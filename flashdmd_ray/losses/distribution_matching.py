"""Distribution matching: the direction from the generator's distribution to the teacher's, seen through two denoisers."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdmd_ray.diffusion.schedule import upcast


@torch.no_grad()
def distribution_matching_gradient(x: Tensor, x_real: Tensor, x_fake: Tensor, epsilon: float = 1e-6) -> Tensor:
    """dL_DM/dx for generator outputs x, all (B, C, h, w); float32, detached.

        g = (x_fake - x_real) / (mean_CHW |x - x_real| + epsilon)        per sample
        L_DM = 1/2 mean (x - stopgrad(x - g))^2   =>   dL_DM/dx = g / numel(x)

    x_real: x0 of the guided teacher at the re-noised x; x_fake: x0 of the score estimator there, without guidance. numel(x) counts this
    tensor only: a rank's gradient is that of its shard's mean, which equal shards turn into the global mean when they are averaged.

    Raises FloatingPointError when an input, hence the gradient, is not finite: a zero in its place would hide a broken network.
    """
    x, x_real, x_fake = upcast(x), upcast(x_real), upcast(x_fake)
    assert x.shape == x_real.shape == x_fake.shape, "the generator's output and both denoisers' answers have one shape"
    per_sample = tuple(range(1, x.ndim))
    normaliser = (x - x_real).abs().mean(dim=per_sample, keepdim=True) + epsilon
    gradient = (x_fake - x_real) / normaliser / x.numel()
    # An infinite normaliser would divide a broken sample away to a zero gradient.
    bad = ~(torch.isfinite(gradient) & torch.isfinite(normaliser)).flatten(1).all(dim=1)
    if bad.any():
        named = {"generator output": x, "teacher": x_real, "score estimator": x_fake}
        sources = [name for name, value in named.items() if not torch.isfinite(value).all()]
        raise FloatingPointError(
            f"distribution matching gradient is not finite for {int(bad.sum())} of {len(x)} samples; "
            f"not finite: {', '.join(sources) or 'their ratio'}"
        )
    return gradient


def surrogate(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is `gradient`: sum(x * stopgrad(gradient)).

    It carries a critic's dL/dx into the generator's backward. The sum of two surrogates is one loss, one backward, and each objective
    reaches only the forward that made its x. x, gradient: (B, C, h, w), not necessarily on one device.
    """
    assert x.shape == gradient.shape, f"gradient {tuple(gradient.shape)} for output {tuple(x.shape)}"
    return (upcast(x) * upcast(gradient.detach().to(x.device))).sum()
