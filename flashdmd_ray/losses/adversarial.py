"""The adversarial game on discriminator logits of any shape. `kind`:

hinge            D: relu(1 - D(real)) + relu(1 + D(fake))              G: -D(fake)                   (the paper's text)
non_saturating   D: -log sig D(real) - log(1 - sig D(fake))            G: -log sig D(fake)           (its equations; DMD2)
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import relu, softplus

from flashdmd_ray.diffusion.schedule import upcast

KINDS = ("hinge", "non_saturating")


def generator_loss(fake_logits: Tensor, kind: str) -> Tensor:
    """Mean over all logits of the generator's loss, a float32 scalar. Raises ValueError for an unknown kind."""
    _check(kind)
    fake_logits = upcast(fake_logits)
    return -fake_logits.mean() if kind == "hinge" else softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Mean over real plus mean over fake logits, a float32 scalar. Raises ValueError for an unknown kind."""
    _check(kind)
    real_logits, fake_logits = upcast(real_logits), upcast(fake_logits)
    if kind == "hinge":
        return relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the real and of the generated images, from one forward over real images followed by as many generated ones."""
    real, fake = logits.chunk(2)
    return real, fake


def balanced_weight(reference_norm: float, adversarial_norm: float, ratio: float) -> float:
    """lambda with lambda * adversarial_norm = ratio * reference_norm.

    The norms are those of dL/dx of the two objectives at unit weight, in latent space. Theirs is 0.2 to 2.4 of one another in the demo and
    depends on decoder, discriminator and data, so a ratio travels between models where a fixed lambda does not. In the generator's weights
    the ratio is another one, because the two gradients enter at different timesteps.
    0 when the adversarial gradient is zero. Raises FloatingPointError when a norm is not finite.
    """
    if not (math.isfinite(reference_norm) and math.isfinite(adversarial_norm)):
        raise FloatingPointError(
            f"gradient norms are not finite: distribution matching {reference_norm}, adversarial {adversarial_norm}"
        )
    return ratio * reference_norm / adversarial_norm if adversarial_norm > 0 else 0.0


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"adversarial loss '{kind}' is unknown; use one of {', '.join(KINDS)}")
