"""Loss of a reward model on labelled pairs."""

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
