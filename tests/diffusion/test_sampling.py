"""Samplers against the stock schedulers' loops, and backward simulation against Gaussian closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashdmd_ray.diffusion.sampling import (
    backward_simulation,
    ddim_sample,
    denoise_to_clean,
    few_step_sample,
    guided,
    renoise,
    step_distribution,
    trailing_timesteps,
)
from flashdmd_ray.diffusion.schedule import FlowSchedule
from tests.gaussian import FAMILIES, SDXL_SCHEDULER, Gaussian, at, normal, vp

SHAPE = (2, 4, 3, 3)
FOUR = (999, 749, 499, 249)


class Network(nn.Module):
    """A fixed nonlinear map that depends on its timestep, in the place of a trained network."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(0.5 * normal((4, 4), 7))

    def forward(self, noisy, t):
        level = (t.to(noisy.dtype) / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix, noisy) + level) * 0.9


def predictor(schedule, network=None):
    network = network or Network()
    return lambda noisy, t: schedule.to_x0(network(noisy, schedule.network_timestep(t)), noisy, t)


def drawn(seed=0, shape=SHAPE):
    return lambda k: normal(shape, 1000 * seed + k)


def test_trailing_timesteps_of_usual_step_counts():
    assert trailing_timesteps(4) == FOUR
    assert trailing_timesteps(1) == (999,)
    assert trailing_timesteps(8)[-1] == 124
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            trailing_timesteps(wrong)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 20, 25, 28, 30, 32, 40, 50, 100])
def test_trailing_timesteps_equal_ddim(steps):
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(steps)
    assert trailing_timesteps(steps) == tuple(stock.timesteps.tolist())


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 2000))
def test_trailing_timesteps_descend_evenly_from_the_noisiest(data, length):
    """For every count, where the stock grid sometimes has one timestep too many (61) or rounds a half by accumulated error (48)."""
    steps = data.draw(st.integers(1, length))
    timesteps = trailing_timesteps(steps, length)
    gaps = [a - b for a, b in pairwise(timesteps)]
    assert len(timesteps) == steps
    assert timesteps[0] == length - 1
    assert timesteps[-1] >= 0
    assert all(length / steps - 1 <= gap <= length / steps + 1 and gap >= 1 for gap in gaps)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 25])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
@torch.no_grad()
def test_teacher_sampling_equals_ddim(prediction_type, steps, set_alpha_to_one, zero_snr):
    changes = {"set_alpha_to_one": set_alpha_to_one, "rescale_betas_zero_snr": zero_snr}
    config = SDXL_SCHEDULER | changes | {"prediction_type": prediction_type}
    stock = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    stock.set_timesteps(steps)
    network, noisy = Network(), normal(SHAPE, 0)
    for t in stock.timesteps:
        noisy = stock.step(network(noisy, t.expand(2)), t, noisy).prev_sample
    schedule = vp(prediction_type, **changes)
    found = ddim_sample(predictor(schedule, network), schedule, steps, normal(SHAPE, 0))
    torch.testing.assert_close(found, noisy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 28])
@torch.no_grad()
def test_flow_teacher_sampling_equals_flow_match_euler(steps, shift):
    """On sigmas 1, 1-1/n, .., 1/n, as SD3-type pipelines pass them; 28 steps fall between the 1000 training timesteps."""
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=[(t + 1) / 1000 for t in trailing_timesteps(steps)])
    network, noisy = Network(), normal(SHAPE, 0)
    for t in stock.timesteps:
        noisy = stock.step(network(noisy, t.expand(2)), t, noisy).prev_sample
    schedule = FlowSchedule(shift)
    found = ddim_sample(predictor(schedule, network), schedule, steps, normal(SHAPE, 0))
    torch.testing.assert_close(found, noisy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@torch.no_grad()
def test_few_step_sampling_equals_the_stock_lcm_scheduler(steps, prediction_type):
    """So an export with LCMScheduler gives these very images.

    Its skip scaling c_skip is not zero but below 2e-7 at t >= 124, and c_out below 1 by as little: float32 does not see either.
    """
    config = SDXL_SCHEDULER | {"prediction_type": prediction_type}
    stock = LCMScheduler.from_config(config, original_inference_steps=steps)
    stock.set_timesteps(steps)
    assert tuple(stock.timesteps.tolist()) == trailing_timesteps(steps)
    assert stock.get_scalings_for_boundary_condition_discrete(stock.timesteps[-1].item())[0] < 2e-7

    generator = torch.Generator().manual_seed(3)
    network, noisy = Network(), normal(SHAPE, 0)
    for t in stock.timesteps:
        noisy = stock.step(network(noisy, t.expand(2)), t, noisy, generator=generator).prev_sample

    generator = torch.Generator().manual_seed(3)
    noises = [normal(SHAPE, 0), *(torch.randn(SHAPE, generator=generator) for _ in range(steps - 1))]
    schedule = vp(prediction_type)
    found = few_step_sample(predictor(schedule, network), schedule, trailing_timesteps(steps), noises.__getitem__)
    torch.testing.assert_close(found, noisy, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@torch.no_grad()
def test_few_step_flow_sampling_equals_stochastic_flow_match_euler(steps):
    schedule, network = FlowSchedule(3.0), Network()
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    stock.set_timesteps(sigmas=[(t + 1) / 1000 for t in trailing_timesteps(steps)])
    noisy = normal(SHAPE, 0)
    with torch.random.fork_rng(devices=[]):  # the stock step draws from the ambient generator
        torch.manual_seed(5)
        for t in stock.timesteps:
            noisy = stock.step(network(noisy, t.expand(2)), t, noisy).prev_sample
    generator = torch.Generator().manual_seed(5)
    noises = [normal(SHAPE, 0), *(torch.randn(SHAPE, generator=generator) for _ in range(steps - 1))]
    found = few_step_sample(predictor(schedule, network), schedule, trailing_timesteps(steps), noises.__getitem__)
    torch.testing.assert_close(found, noisy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@torch.no_grad()
def test_simulating_to_any_step_and_on_is_the_whole_sampler(family, steps):
    schedule, timesteps = FAMILIES[family], trailing_timesteps(steps)
    predict_x0 = predictor(schedule)
    whole = few_step_sample(predict_x0, schedule, timesteps, drawn())
    for i in range(steps):
        noisy = backward_simulation(predict_x0, schedule, timesteps, i, drawn())
        x0 = predict_x0(noisy, at(timesteps[i], 2))
        assert torch.equal(denoise_to_clean(predict_x0, schedule, timesteps, i, x0, drawn()), whole)


def test_backward_simulation_starts_from_pure_noise():
    def unused(noisy, t):
        raise AssertionError("no forward before the first timestep")

    assert torch.equal(backward_simulation(unused, FAMILIES["eps"], FOUR, 0, drawn()), normal(SHAPE, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hop_takes_fresh_noise(family):
    """The noise in each input, recovered from what the network saw and answered, is that hop's own draw and no other."""
    schedule, shape, asked, seen = FAMILIES[family], (2000, 1, 1, 1), [], []
    answer = Gaussian(0.3, 0.5).denoiser(schedule)

    def predict_x0(noisy, t):
        seen.append((noisy, answer(noisy, t)))
        return seen[-1][1]

    def noise_sampler(k):
        asked.append(k)
        return normal(shape, k)

    few_step_sample(predict_x0, schedule, FOUR, noise_sampler)
    assert asked == [0, 1, 2, 3]
    noises = [seen[0][0]]
    for k in range(1, 4):
        a, s = schedule.coefficients(at(FOUR[k], 1))
        noises.append((seen[k][0] - a * seen[k - 1][1]) / s)
        torch.testing.assert_close(noises[k], normal(shape, k), rtol=0, atol=1e-5)
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in noises])) - torch.eye(4)
    assert correlation.abs().max() < 0.08  # 3.6 standard errors of 2000 independent pairs

    asked.clear()
    backward_simulation(predict_x0, schedule, FOUR, 2, noise_sampler)
    assert asked == [0, 1, 2]
    asked.clear()
    denoise_to_clean(predict_x0, schedule, FOUR, 2, normal(shape, 9), noise_sampler)
    assert asked == [3]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step_index", [1, 2, 3])
def test_simulated_marginals_of_an_exact_denoiser(family, step_index):
    """E[x0 | x_t] is affine in x_t, so mean and variance of every simulated input follow by hand."""
    schedule, data, count = FAMILIES[family], Gaussian(0.7, 0.4), 40_000
    mean, variance = 0.0, 1.0
    for k in range(step_index):
        a, s = (c.item() for c in schedule.coefficients(at(FOUR[k], 1)))
        gain = a * data.std**2 / (a**2 * data.std**2 + s**2)
        mean_x0, variance_x0 = data.mean + gain * (mean - a * data.mean), gain**2 * variance
        a, s = (c.item() for c in schedule.coefficients(at(FOUR[k + 1], 1)))
        mean, variance = a * mean_x0, a**2 * variance_x0 + s**2
    noisy = backward_simulation(data.denoiser(schedule), schedule, FOUR, step_index, drawn(shape=(count, 1, 1, 1)))
    assert noisy.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert noisy.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("step_index", [1, 2, 3])
def test_a_perfect_flow_generator_simulates_the_forward_process(step_index):
    """Its inputs have the marginals N(a m, a^2 c^2 + s^2) of noised data: nothing of training differs from sampling."""
    schedule, data, count = FlowSchedule(3.0), Gaussian(0.7, 0.4), 40_000
    noisy = backward_simulation(data.transport(schedule), schedule, FOUR, step_index, drawn(shape=(count, 1, 1, 1)))
    a, s = (c.item() for c in schedule.coefficients(at(FOUR[step_index], 1)))
    variance = a**2 * data.std**2 + s**2
    assert noisy.mean().item() == pytest.approx(a * data.mean, abs=5 * math.sqrt(variance / count))
    assert noisy.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_teacher_samples_the_data(family):
    """Up to its start: SDXL's x_999 keeps 0.068 of the image's mean, which pure noise lacks; a flow's x_999 is pure noise."""
    schedule, data, count = FAMILIES[family], Gaussian(0.7, 0.4), 20_000
    a, s = (c.item() for c in schedule.coefficients(at(999, 1)))
    spread = math.sqrt(a**2 * data.std**2 + s**2)
    samples = ddim_sample(data.denoiser(schedule), schedule, 200, normal((count, 1, 1, 1), 0))
    assert samples.mean().item() == pytest.approx(data.mean - data.std * a * data.mean / spread, abs=0.01)
    assert samples.std().item() == pytest.approx(data.std / spread, rel=0.03)


def test_simulations_carry_no_gradient():
    schedule, network = FAMILIES["eps"], Network()
    predict_x0 = predictor(schedule, network)
    start = normal(SHAPE, 0)
    assert predict_x0(start, at(999, 2)).requires_grad
    for found in (
        backward_simulation(predict_x0, schedule, FOUR, 2, drawn()),
        denoise_to_clean(predict_x0, schedule, FOUR, 0, predict_x0(start, at(999, 2)), drawn()),
        few_step_sample(predict_x0, schedule, FOUR, drawn()),
        ddim_sample(predict_x0, schedule, 2, start),
    ):
        assert not found.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_transition_is_the_hop_and_keeps_the_gradient(family):
    schedule = FAMILIES[family]
    x0, noise = normal(SHAPE, 0).requires_grad_(), normal(SHAPE, 1)
    mean, std = step_distribution(schedule, x0, 749)
    assert torch.equal(mean + std * noise, renoise(schedule, x0, 749, noise))
    (gradient,) = torch.autograd.grad(mean.sum(), x0)
    assert torch.equal(gradient, schedule.coefficients(at(749, 1))[0].expand(SHAPE))


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_of_x0_is_guidance_of_the_prediction(family):
    schedule, cond, uncond = FAMILIES[family], normal(SHAPE, 1), normal(SHAPE, 2)
    noisy, t = normal(SHAPE, 0), torch.tensor([400, 900])
    found = guided(lambda x, t: schedule.to_x0(cond, x, t), lambda x, t: schedule.to_x0(uncond, x, t), 8.0)(noisy, t)
    expected = schedule.to_x0(uncond + 8 * (cond - uncond), noisy, t)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-4)


def test_guidance_scale_one_needs_no_unconditional_forward():
    conditional = predictor(FAMILIES["eps"])

    def unused(noisy, t):
        raise AssertionError("called")

    assert guided(conditional, unused, 1.0) is conditional
