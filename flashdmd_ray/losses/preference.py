"""Latent preference RL: choose the best and the worst of K candidates from one noisy latent, and move their likelihoods apart.

The policy at a high-noise timestep is Gaussian, p(z | x_t) = N(mu, s_next^2 I) with mu = a_next G(x_t, t)
(`diffusion.sampling.transition`), so its log-ratios are closed forms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flashdmd_ray.diffusion.schedule import upcast


def log_ratio_difference(mean_theta: Tensor, mean_ref: Tensor, winners: Tensor, losers: Tensor, std: float) -> Tensor:
    """H = log p_theta(z_w)/p_ref(z_w) - log p_theta(z_l)/p_ref(z_l), float32 (B,).

        H = sum_CHW [(z_w - z_l) (mu_theta - mu_ref)] / (std^2 sqrt(CHW))

    All tensors (B, C, h, w). Both candidates come from one x_t, hence one mean and the quadratic terms cancel. The product is noise times a
    small change, so its sum grows with sqrt(CHW): divided by that, a change of the same size per number gives the same H at every
    resolution, H ~ 1.4 rms(mu_theta - mu_ref) / std, and beta means the same. (LPO divides by CHW; its beta is sqrt(CHW) times ours.)
    Gradient flows to mean_theta.
    """
    product = ((upcast(winners) - upcast(losers)) * (upcast(mean_theta) - upcast(mean_ref))).flatten(1)
    return product.sum(dim=1) / (std**2 * product.shape[1] ** 0.5)


def preference_loss(log_ratio: Tensor, beta: float, weights: Tensor) -> Tensor:
    """mean_B w_b (-log sigmoid(beta H_b)), a scalar; exactly log 2 at theta = reference with unit weights.

    log_ratio: H (B,); weights: (B,), 0 for a pair that was not kept, see `pair_weights`. The mean is over all B, dropped pairs included,
    so that shards of equal size average to the global loss however the kept pairs fall on them.
    """
    log_ratio = torch.where(weights > 0, log_ratio, 0.0)  # a dropped pair may hold anything, also nan
    return (weights * -logsigmoid(beta * log_ratio)).mean()


def pair_weights(keep: Tensor) -> Tensor:
    """Weights (B,), float32, that make the mean of `preference_loss` the mean over the kept pairs of the *whole* batch.

    B / kept for a kept pair, 0 for the others; all 0 when none was kept. keep: bool (B,), of the global batch, before it is split.
    """
    return keep.float() * (len(keep) / keep.sum().clamp(min=1))


def combine_rewards(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """One reward per candidate: sum_r weight_r * (r - mean_K r) / std_K r, each normalised within its prompt group.

    rewards: name -> (B, K); weights: name -> float above 0, of the rewards that are optimised; others count for nothing. Returns
    (combined (B, K) float32, kept (B,) bool). A group with a reward that is not finite is dropped as a whole, its combined values nan:
    a failed reward must not pass for a bad image. A reward that does not tell the K candidates of a group apart adds 0 to all of them.

    std is over the K candidates (not K-1). Raises ValueError when a reward is missing or there is no weight above 0.
    """
    if missing := set(weights) - set(rewards):
        raise ValueError(f"there are weights for {sorted(missing)}, but rewards of {sorted(rewards)}")
    if not weights or min(weights.values()) <= 0:
        raise ValueError(f"nothing says which candidate is better: every weight must be above 0, got {dict(weights)}")
    used = [(rewards[name].double(), weight) for name, weight in weights.items()]
    kept = torch.stack([torch.isfinite(values).all(dim=1) for values, _ in used]).all(dim=0)
    combined = torch.stack([weight * _normalised(values) for values, weight in used]).sum(dim=0)
    return torch.where(kept[:, None], combined, torch.nan).float(), kept


def _normalised(values: Tensor) -> Tensor:
    centred = values - values.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    # Rewards are made in float32: a spread near its resolution is rounding, and dividing by it would make it a verdict.
    resolved = std > 1e-6 * values.abs().amax(dim=1, keepdim=True)
    return torch.where(resolved, centred / std, 0.0)


def select_pairs(rewards: Tensor, threshold: float, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Winner and loser of each group, and whether they differ enough to be learnt from.

        p = softmax_K(rewards / temperature),   margin = max p - min p,   keep = margin > threshold

    rewards: (B, K), not finite for a dropped group. Returns (winner int64 (B,), loser int64 (B,), margin float32 (B,), keep bool (B,));
    ties keep nothing (margin 0), and so does a group that is not finite (indices 0, margin 0).
    Raises ValueError when K < 2, threshold is outside [0, 1) or temperature is not positive.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"a preference pair needs at least 2 candidates per prompt, got rewards of shape {tuple(rewards.shape)}"
        )
    if not (0 <= threshold < 1 and temperature > 0):
        raise ValueError(f"threshold must be in [0, 1) and temperature above 0, got {threshold} and {temperature}")
    finite = torch.isfinite(rewards).all(dim=1)
    usable = torch.where(finite[:, None], upcast(rewards), 0.0)  # a tie, which is never kept
    winner, loser = usable.argmax(dim=1), usable.argmin(dim=1)
    probabilities = torch.softmax(usable / temperature, dim=1)
    margin = probabilities.amax(dim=1) - probabilities.amin(dim=1)
    return winner, loser, margin, margin > threshold
