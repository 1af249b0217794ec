"""Losses of reward models."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from flashdmd_ray.diffusion.schedule import upcast


def pair_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the 2-way softmax over a pair's rewards with its label (PickScore, LPO):

        p = exp(r_0) / (exp(r_0) + exp(r_1)),   L = -mean[y log p + (1 - y) log(1 - p)].

    rewards: float (B, 2). labels: y, float (B,): 1 the first is better, 0 the second, 0.5 a tie. Returns a float32 scalar.
    """
    rewards = upcast(rewards)
    return F.binary_cross_entropy_with_logits(rewards[:, 0] - rewards[:, 1], labels.to(rewards))


def stem_loss(patches: Tensor, embeddings: Tensor, patch_targets: Tensor, embedding_targets: Tensor) -> Tensor:
    """Distance of a stem's view of latents from a tower's view of the decoded images:

        L = mean (p - p*)^2 / var(p*)  +  10 mean (1 - cos(e, e*)).

    patches: p, p*, float (B, D, g, g). embeddings: e, e*, float (B, F) of unit length. Returns a float32 scalar. The first term alone
    weighs every patch alike; the second weighs what the reward reads. The factor 10 was not tuned.
    """
    far = (upcast(patches) - upcast(patch_targets)).square().mean() / upcast(patch_targets).var()
    return far + 10 * (1 - (upcast(embeddings) * upcast(embedding_targets)).sum(dim=-1)).mean()
