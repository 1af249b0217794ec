"""Forward processes against the stock schedulers, and the conversions against one another."""

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashdmd_ray.diffusion.schedule import FlowSchedule, VPSchedule, schedule_from_config
from tests.gaussian import FAMILIES, SDXL_SCHEDULER, at, normal, vp

ALL = torch.arange(1000)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
        "LCMScheduler",
    ],
)
@pytest.mark.parametrize("betas", [BETAS, {"beta_schedule": "squaredcos_cap_v2"}], ids=["scaled_linear", "cosine"])
def test_variance_preserving_coefficients_are_those_of_the_stock_scheduler(name, betas):
    stock = getattr(diffusers, name)(**betas)
    a, s = schedule_from_config(stock.config).coefficients(ALL)
    assert torch.equal(a, stock.alphas_cumprod**0.5)
    assert torch.equal(s, (1 - stock.alphas_cumprod) ** 0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_ddpm(prediction_type):
    stock = diffusers.DDPMScheduler.from_config(SDXL_SCHEDULER)
    schedule = vp(prediction_type)
    x0, noise, t = normal((5, 4, 2, 2), 0), normal((5, 4, 2, 2), 1), torch.tensor([0, 1, 500, 998, 999])
    assert torch.equal(schedule.add_noise(x0, noise, t), stock.add_noise(x0, noise, t))
    target = noise if prediction_type == "epsilon" else stock.get_velocity(x0, noise, t)
    assert torch.equal(schedule.target(x0, noise, t), target)
    assert torch.equal(schedule.network_timestep(t), t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_equals_flow_match_euler(shift):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = schedule_from_config(stock.config)
    a, s = schedule.coefficients(ALL)
    assert torch.equal(s, stock.sigmas.flip(0))
    assert torch.equal(a, 1 - s)
    assert torch.equal(schedule.network_timestep(ALL), stock.timesteps.flip(0))
    x0, noise, t = normal((3, 4, 2, 2), 0), normal((3, 4, 2, 2), 1), torch.tensor([0, 500, 999])
    stock_noisy = stock.scale_noise(x0, schedule.network_timestep(t), noise)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), stock_noisy)


def test_flow_levels_follow_the_shift_formula():
    schedule = FlowSchedule(shift=3.0)
    for t, u in ((999, 1.0), (749, 0.75), (499, 0.5), (249, 0.25)):
        assert schedule.coefficients(at(t, 1))[1].item() == pytest.approx(3 * u / (1 + 2 * u), abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 2**31), t=st.integers(0, 999), wide=st.booleans())
def test_the_target_converts_back_to_image_and_noise(family, seed, t, wide):
    schedule, dtype = FAMILIES[family], torch.float64 if wide else torch.float32
    x0, noise = normal((2, 3, 2, 2), seed).to(dtype), normal((2, 3, 2, 2), seed + 1).to(dtype)
    timesteps = at(t, 2)
    a, s = schedule.coefficients(timesteps)
    noisy, target = schedule.add_noise(x0, noise, timesteps), schedule.target(x0, noise, timesteps)
    found_x0, found_noise = schedule.to_x0(target, noisy, timesteps), schedule.to_noise(target, noisy, timesteps)
    assert found_x0.dtype == found_noise.dtype == dtype
    # eps divides by a, which is 0.068 at t = 999, and with it the rounding of x_t; the coefficients are float32 throughout.
    torch.testing.assert_close(found_x0, x0, rtol=0, atol=2e-6 / (a[0].item() if family == "eps" else 1))
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        a.reshape(-1, 1, 1, 1) * found_x0 + s.reshape(-1, 1, 1, 1) * found_noise, noisy, rtol=0, atol=3e-6
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), t=st.integers(0, 999))
def test_eps_and_v_networks_that_mean_the_same_agree(seed, t):
    x0, noise, timesteps = normal((2, 3, 2, 2), seed), normal((2, 3, 2, 2), seed + 1), at(t, 2)
    eps, v = FAMILIES["eps"], FAMILIES["v"]
    noisy = eps.add_noise(x0, noise, timesteps)
    from_eps = eps.to_x0(eps.target(x0, noise, timesteps), noisy, timesteps)
    from_v = v.to_x0(v.target(x0, noise, timesteps), noisy, timesteps)
    torch.testing.assert_close(from_eps, from_v, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_predictions_are_converted_in_float32(family):
    schedule, t = FAMILIES[family], at(999, 2)
    noisy, prediction = normal((2, 3, 2, 2), 0).bfloat16(), normal((2, 3, 2, 2), 1).bfloat16()
    for convert in (schedule.to_x0, schedule.to_noise, schedule.add_noise, schedule.target):
        found = convert(prediction, noisy, t)
        assert found.dtype == torch.float32
        assert torch.equal(found, convert(prediction.float(), noisy.float(), t))


def test_each_sample_has_its_own_timestep():
    schedule = FAMILIES["eps"]
    x0, noise, t = normal((3, 2, 2, 2), 0), normal((3, 2, 2, 2), 1), torch.tensor([10, 500, 990])
    together = schedule.add_noise(x0, noise, t)
    for i in range(3):
        assert torch.equal(together[i : i + 1], schedule.add_noise(x0[i : i + 1], noise[i : i + 1], t[i : i + 1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(family, t):
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        FAMILIES[family].coefficients(at(t, 1))


def test_timesteps_of_another_kind_are_refused():
    for wrong in (torch.tensor([999.0]), torch.tensor(999), torch.tensor([999], dtype=torch.int32)):
        with pytest.raises(AssertionError, match="int64"):
            FAMILIES["eps"].coefficients(wrong)
    with pytest.raises(AssertionError, match="batch of 2"):
        FAMILIES["eps"].add_noise(normal((2, 1, 1, 1), 0), normal((2, 1, 1, 1), 1), at(999, 1))


def test_zero_terminal_snr_works_for_v_and_is_refused_for_eps():
    schedule = vp("v_prediction", rescale_betas_zero_snr=True)
    noise, v = normal((2, 3, 2, 2), 0), normal((2, 3, 2, 2), 1)
    assert torch.equal(schedule.coefficients(at(999, 1))[0], torch.zeros(1))
    assert torch.equal(schedule.to_x0(v, noise, at(999, 2)), -v)
    with pytest.raises(ValueError, match="v-prediction"):
        vp("epsilon", rescale_betas_zero_snr=True)


def test_the_final_step_follows_set_alpha_to_one():
    assert vp().final_coefficients == (1.0, 0.0)
    a, s = vp().coefficients(at(0, 1))
    kept = vp(set_alpha_to_one=False).final_coefficients
    assert kept == pytest.approx((a.item(), s.item()), rel=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SDXL_SCHEDULER | {"prediction_type": "sample"}, "prediction_type 'sample'"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
            "use_dynamic_shifting",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "shift must be positive"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 0.002}, "CMStochasticIterativeScheduler"),
        ({}, "scheduler config has neither"),
        (SDXL_SCHEDULER | {"num_train_timesteps": 500}, "500 training timesteps"),
        (SDXL_SCHEDULER | {"beta_schedule": "cosine"}, "beta_schedule 'cosine' is unknown"),
        (SDXL_SCHEDULER | {"beta_end": "0.012"}, "beta_end must be a positive number"),
        (SDXL_SCHEDULER | {"trained_betas": [0.1] * 10}, "trained_betas must be 1000"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_unsupported_schedulers_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config(config)


def test_the_family_is_chosen_by_the_config():
    assert isinstance(schedule_from_config(SDXL_SCHEDULER), VPSchedule)
    assert isinstance(schedule_from_config(diffusers.FlowMatchLCMScheduler(shift=3.0).config), FlowSchedule)
