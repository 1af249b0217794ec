"""The denoising loss: its mean, its weights, and the value an exact denoiser reaches."""

import pytest
import torch

from flashdmd_ray.losses.denoising import denoising_loss
from tests.gaussian import FAMILIES, Gaussian, at, normal

SHAPE = (4, 3, 2, 2)


def test_it_is_the_mean_squared_error():
    prediction, target = normal(SHAPE, 0), normal(SHAPE, 1)
    torch.testing.assert_close(denoising_loss(prediction, target), torch.nn.functional.mse_loss(prediction, target))


def test_padding_weighs_nothing_and_reaches_no_gradient():
    prediction, target = normal(SHAPE, 0).requires_grad_(), normal(SHAPE, 1)
    weights = torch.tensor([1.0, 1.0, 0.0, 3.0])
    loss = denoising_loss(prediction, target, weights)
    per_sample = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, (per_sample[0] + per_sample[1] + 3 * per_sample[3]) / 4)
    loss.backward()
    assert (prediction.grad[2] == 0).all()
    assert (prediction.grad[[0, 1, 3]] != 0).all()


def test_shards_of_equal_size_average_to_the_global_loss():
    prediction, target, weights = normal(SHAPE, 0), normal(SHAPE, 1), torch.tensor([1.0, 0.0, 1.0, 1.0])
    halves = [denoising_loss(*(x[i : i + 2] for x in (prediction, target, weights))) for i in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, denoising_loss(prediction, target, weights))


def test_half_precision_is_widened_first():
    prediction, target = normal(SHAPE, 0).bfloat16(), normal(SHAPE, 1).bfloat16()
    loss = denoising_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, denoising_loss(prediction.float(), target.float()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [100, 600])
def test_an_exact_denoiser_reaches_the_posterior_variance_and_no_other_does_better(family, t):
    """E (x0 - E[x0 | x_t])^2 = c^2 s^2 / (a^2 c^2 + s^2), in x0; in the network's own parameterisation it is the minimum too."""
    schedule, data, count = FAMILIES[family], Gaussian(0.7, 0.4), 20_000
    shape, timesteps = (count, 1, 1, 1), at(t, count)
    x0, noise = data.sample(shape, 0), normal(shape, 1)
    noisy = schedule.add_noise(x0, noise, timesteps)
    answer = data.denoiser(schedule)(noisy, timesteps)
    a, s = (c[0].item() for c in schedule.coefficients(timesteps))
    posterior_variance = data.std**2 * s**2 / (a**2 * data.std**2 + s**2)
    assert denoising_loss(answer, x0).item() == pytest.approx(posterior_variance, rel=0.04)

    target = schedule.target(x0, noise, timesteps)
    exact = schedule.target(answer, (noisy - a * answer) / s, timesteps)
    best = denoising_loss(exact, target)
    for other in (exact + 0.1, exact - 0.1, exact * 1.1, exact * 0.9):
        assert denoising_loss(other, target) > best
