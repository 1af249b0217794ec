"""The distribution matching gradient: its equation, its Gaussian closed form, and how it reaches the generator."""

import pytest
import torch
from torch import nn

from flashdmd_ray.losses.distribution_matching import distribution_matching_gradient, surrogate
from tests.gaussian import FAMILIES, Gaussian, at, normal

SHAPE = (3, 4, 2, 2)


def test_it_is_the_gradient_of_the_matching_loss():
    """L = 1/2 mean (x - stopgrad(x - g))^2, with g written out sample by sample."""
    x, x_real, x_fake = normal(SHAPE, 0).requires_grad_(), normal(SHAPE, 1), normal(SHAPE, 2)
    g = torch.stack(
        [(f - r) / ((d - r).abs().mean() + 1e-6) for d, r, f in zip(x.detach(), x_real, x_fake, strict=True)]
    )
    loss = 0.5 * (x - (x - g).detach()).square().mean()
    (expected,) = torch.autograd.grad(loss, x)
    found = distribution_matching_gradient(x, x_real, x_fake)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [20, 500, 980])
def test_it_vanishes_where_the_generator_is_the_data(family, t):
    schedule, data = FAMILIES[family], Gaussian(0.7, 0.4)
    x = data.sample(SHAPE, 0)
    noisy = schedule.add_noise(x, normal(SHAPE, 1), at(t, 3))
    answer = data.denoiser(schedule)(noisy, at(t, 3))
    assert torch.equal(distribution_matching_gradient(x, answer, answer), torch.zeros(SHAPE))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [20, 500, 980])
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_gaussians_that_differ_in_mean_have_its_closed_form(family, t, shift):
    """x_fake - x_real = (1 - a^2 c^2 / (a^2 c^2 + s^2)) (m_fake - m_real), everywhere: descent moves the mean towards the data."""
    schedule, data, generated = FAMILIES[family], Gaussian(0.7, 0.4), Gaussian(0.7 + shift, 0.4)
    x, timesteps = generated.sample(SHAPE, 0), at(t, 3)
    noisy = schedule.add_noise(x, normal(SHAPE, 1), timesteps)
    x_real, x_fake = (world.denoiser(schedule)(noisy, timesteps) for world in (data, generated))
    a, s = (c[0].item() for c in schedule.coefficients(timesteps))
    difference = s**2 / (a**2 * data.std**2 + s**2) * shift
    normaliser = (x - x_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    found = distribution_matching_gradient(x, x_real, x_fake)
    torch.testing.assert_close(found, (difference / normaliser / x.numel()).expand(SHAPE), rtol=2e-3, atol=1e-6)
    assert (found.sign() == torch.tensor(shift).sign()).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_descent_carries_a_gaussian_generator_to_the_data(family):
    """x = m + c z with exact denoisers on both sides ends at the data's mean and spread, from either side of them."""
    schedule, data = FAMILIES[family], Gaussian(0.7, 0.4)
    mean, log_std = torch.tensor(-0.5, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 250)
        x = mean + log_std.exp() * torch.randn((64, 4, 2, 2), generator=generator)
        t = torch.randint(20, 981, (64,), generator=generator)
        noisy = schedule.add_noise(x.detach(), torch.randn(x.shape, generator=generator), t)
        own = Gaussian(mean.item(), log_std.exp().item())
        x_real, x_fake = (world.denoiser(schedule)(noisy, t) for world in (data, own))
        optimizer.zero_grad()
        surrogate(x, distribution_matching_gradient(x, x_real, x_fake)).backward()
        optimizer.step()
    assert mean.item() == pytest.approx(data.mean, abs=0.02)
    assert log_std.exp().item() == pytest.approx(data.std, rel=0.05)


def test_each_sample_is_normalised_by_itself():
    x, x_real, x_fake = normal(SHAPE, 0), normal(SHAPE, 1), normal(SHAPE, 2)
    whole = distribution_matching_gradient(x, x_real, x_fake)
    for i in range(3):
        one = distribution_matching_gradient(x[i : i + 1], x_real[i : i + 1], x_fake[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one / 3)
    torch.testing.assert_close(distribution_matching_gradient(10 * x, 10 * x_real, 10 * x_fake), whole)


def test_a_perfect_sample_does_not_divide_by_zero():
    x = normal(SHAPE, 0)
    found = distribution_matching_gradient(x, x, x + 0.1, epsilon=0.5)
    torch.testing.assert_close(found, torch.full(SHAPE, 0.1 / 0.5 / x.numel()))


def test_half_precision_is_widened_first():
    x, x_real, x_fake = (normal(SHAPE, seed).bfloat16() for seed in range(3))
    found = distribution_matching_gradient(x, x_real, x_fake)
    assert found.dtype == torch.float32
    assert torch.equal(found, distribution_matching_gradient(x.float(), x_real.float(), x_fake.float()))


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error_that_names_its_source(position, value):
    tensors = [normal(SHAPE, seed) for seed in range(3)]
    tensors[position][1, 0, 0, 0] = value
    source = ("generator output", "teacher", "score estimator")[position]
    with pytest.raises(FloatingPointError, match=f"1 of 3 samples.*{source}"):
        distribution_matching_gradient(*tensors)


def test_an_overflow_of_finite_answers_is_an_error_too():
    with pytest.raises(FloatingPointError, match="their ratio"):
        distribution_matching_gradient(torch.zeros(SHAPE), torch.full(SHAPE, -3e38), torch.full(SHAPE, 3e38))


def test_the_surrogate_hands_a_gradient_to_the_output_and_to_nothing_else():
    x, gradient = normal(SHAPE, 0).requires_grad_(), normal(SHAPE, 1).requires_grad_()
    surrogate(x, gradient).backward()
    assert torch.equal(x.grad, gradient)
    assert gradient.grad is None
    with pytest.raises(AssertionError, match="gradient"):
        surrogate(x, gradient[:1])


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, noisy):
        return torch.tanh(self.convolution(noisy))


def parameter_gradient(loss, student):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)])


def test_one_backward_routes_each_gradient_to_the_forward_that_made_its_output():
    """matching -> high-noise forward, realism -> low-noise forward, exactly as two backwards on their own would."""
    torch.manual_seed(0)
    student = Student()
    high_noise, low_noise = student(normal(SHAPE, 0).double()), student(normal(SHAPE, 1).double())
    matching, realism, nothing = normal(SHAPE, 2).double(), normal(SHAPE, 3).double(), torch.zeros(SHAPE).double()
    joint = parameter_gradient(surrogate(high_noise, matching) + surrogate(low_noise, realism), student)
    alone = [
        parameter_gradient(surrogate(high_noise, matching), student),
        parameter_gradient(surrogate(low_noise, realism), student),
    ]
    torch.testing.assert_close(joint, alone[0] + alone[1], rtol=1e-12, atol=1e-14)

    # The outputs' own gradients show that nothing crosses over.
    at_coarse, at_fine = torch.autograd.grad(
        surrogate(high_noise, nothing) + surrogate(low_noise, realism), [high_noise, low_noise], retain_graph=True
    )
    assert torch.equal(at_coarse, nothing)
    assert torch.equal(at_fine, realism)


def test_a_critic_that_answers_with_a_gradient_equals_one_graph():
    torch.manual_seed(0)
    student, critic = Student(), nn.Conv2d(4, 1, 3).double()
    noisy = normal((3, 4, 5, 5), 0).double()
    monolithic = parameter_gradient(-critic(student(noisy)).mean(), student)

    output = student(noisy)
    received = output.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(-critic(received).mean(), received)
    torch.testing.assert_close(
        parameter_gradient(surrogate(output, gradient), student), monolithic, rtol=1e-12, atol=1e-14
    )
