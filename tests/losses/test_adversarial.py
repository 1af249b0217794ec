"""Both forms of the adversarial game, and the automatic weight of the generator's side."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from flashdmd_ray.losses.adversarial import KINDS, balanced_weight, discriminator_loss, generator_loss
from tests.gaussian import normal


def test_hinge_written_out():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, -1.0], [0.0, 2.0]])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 0 + 1 + 3) / 4)
    assert generator_loss(fake, "hinge").item() == pytest.approx(0.5)


def test_hinge_stops_at_the_margin():
    real, fake = torch.tensor([1.5, 0.5], requires_grad=True), torch.tensor([-1.5, -0.5], requires_grad=True)
    discriminator_loss(real, fake, "hinge").backward()
    assert real.grad.tolist() == [0.0, -0.5]
    assert fake.grad.tolist() == [0.0, 0.5]


def test_non_saturating_is_cross_entropy():
    real, fake = 3 * normal((4, 7), 0), 3 * normal((4, 7), 1)
    ones, zeros = torch.ones(4, 7), torch.zeros(4, 7)
    expected = binary_cross_entropy_with_logits(real, ones) + binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), expected)
    torch.testing.assert_close(generator_loss(fake, "non_saturating"), binary_cross_entropy_with_logits(fake, ones))


def test_an_undecided_discriminator():
    zeros = torch.zeros(3, 5)
    assert discriminator_loss(zeros, zeros, "hinge").item() == 2
    assert discriminator_loss(zeros, zeros, "non_saturating").item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zeros, "hinge").item() == 0
    assert generator_loss(zeros, "non_saturating").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_players_pull_in_opposite_directions(kind):
    real, fake = normal((4, 7), 0).requires_grad_(), (0.5 * normal((4, 7), 1)).clamp(-0.9, 0.9).requires_grad_()
    (wanted,) = torch.autograd.grad(generator_loss(fake, kind), fake)
    of_real, of_fake = torch.autograd.grad(discriminator_loss(real, fake, kind), [real, fake])
    assert (wanted < 0).all()
    assert (of_fake > 0).all()
    assert (of_real <= 0).all()
    assert (of_real < 0).any()


def test_the_generator_still_learns_when_it_is_found_out():
    """The point of both forms: the gradient does not fade where the discriminator is sure of a fake."""
    for kind in KINDS:
        fake = torch.full((2, 2), -50.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(generator_loss(fake, kind), fake)
        torch.testing.assert_close(gradient, torch.full((2, 2), -0.25))


@pytest.mark.parametrize("kind", KINDS)
def test_large_half_precision_logits_stay_finite(kind):
    real, fake = torch.tensor([300.0, -300.0]).bfloat16(), torch.tensor([300.0, -300.0]).bfloat16()
    for loss in (generator_loss(fake, kind), discriminator_loss(real, fake, kind)):
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss)


def test_an_unknown_kind_is_named():
    for call in (
        lambda: generator_loss(torch.zeros(1), "wgan"),
        lambda: discriminator_loss(torch.zeros(1), torch.zeros(1), "wgan"),
    ):
        with pytest.raises(ValueError, match="'wgan' is unknown; use one of hinge, non_saturating"):
            call()


@given(reference=st.floats(1e-6, 1e6), adversarial=st.floats(1e-6, 1e6), ratio=st.floats(1e-3, 1e3))
def test_the_balanced_weight_sets_the_ratio_of_norms(reference, adversarial, ratio):
    assert balanced_weight(reference, adversarial, ratio) * adversarial == pytest.approx(ratio * reference, rel=1e-9)


def test_the_balanced_weight_in_gradients():
    matching, realism = 1e-3 * normal((2, 3), 0), 40 * normal((2, 3), 1)
    weight = balanced_weight(matching.norm().item(), realism.norm().item(), 0.5)
    assert ((weight * realism).norm() / matching.norm()).item() == pytest.approx(0.5, rel=1e-6)


def test_the_balanced_weight_at_its_borders():
    assert balanced_weight(1.0, 0.0, 0.5) == 0
    assert balanced_weight(0.0, 1.0, 0.5) == 0
    for norms in ((math.nan, 1.0), (1.0, math.nan), (1.0, math.inf), (math.inf, 1.0)):
        with pytest.raises(FloatingPointError, match="not finite"):
            balanced_weight(*norms, 0.5)
