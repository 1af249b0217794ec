"""Samplers: the few-step generator's stochastic steps, and the teacher's deterministic ones.

`timesteps` is always descending, for example (999, 749, 499, 249). A sampler is given its noise: `noise_sampler(k)` returns the noise of
step k, float32 (B, C, h, w), on the device of the model; k = 0 is the start and k > 0 renoises to timesteps[k]. It is called once for
each k it needs, so noise that depends on k alone is fresh at every step. (Correlated noise leaves artefacts in DMD-type training.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flashdmd_ray.diffusion.schedule import NoiseSchedule, upcast

PredictX0 = Callable[[Tensor, Tensor], Tensor]
"""(noisy (B, C, h, w), timesteps int64 (B,)) -> x0 (B, C, h, w) in float32; conditioning is already bound."""

NoiseSampler = Callable[[int], Tensor]
Coefficient = Tensor | float


def timesteps_like(timestep: int, like: Tensor) -> Tensor:
    """`timestep` for every sample of `like`, int64 (B,), on its device."""
    return torch.full((len(like),), timestep, dtype=torch.int64, device=like.device)


def guided(predict_cond: PredictX0, predict_uncond: PredictX0, scale: float) -> PredictX0:
    """Classifier-free guidance x0 = x0_uncond + scale (x0_cond - x0_uncond).

    At one (x_t, t) x0 is affine in eps and in v, so this is the usual guidance of those. Scale 1 does not call `predict_uncond`.
    """
    if scale == 1:
        return predict_cond

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        uncond = predict_uncond(noisy, t)
        return uncond + scale * (predict_cond(noisy, t) - uncond)

    return predict


def renoise(schedule: NoiseSchedule, x0: Tensor, t_next: int | Tensor, noise: Tensor) -> Tensor:
    """Renoise to the next timestep: x_next = a_next x0 + s_next e with fresh noise e; all (B, C, h, w). No skip or output scalings.

    t_next: one timestep, or int64 (B,) where every sample has its own.
    """
    return schedule.add_noise(x0, noise, timesteps_like(t_next, x0) if isinstance(t_next, int) else t_next)


def step_distribution(schedule: NoiseSchedule, x0: Tensor, next_timestep: int) -> tuple[Tensor, float]:
    """Distribution of the renoised sample, the policy N(mean, std^2 I): mean = a_next x0 (B, C, h, w), with gradient; std = s_next."""
    a, s = schedule.coefficients(torch.tensor([next_timestep]))
    return a.item() * upcast(x0), s.item()


@torch.no_grad()
def backward_simulation(
    predict_x0: PredictX0,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    step_index: int,
    noise_sampler: NoiseSampler,
) -> Tensor:
    """B(t_i): the generator's own input at timesteps[step_index], simulated without gradient from pure noise.

    x_{k+1} = a_{k+1} G(x_k, t_k) + s_{k+1} e_{k+1}, from x_0 = e_0; float32 (B, C, h, w). Makes `step_index` forwards: all ranks of a
    group must be given the same.
    """
    return backward_simulations(predict_x0, schedule, timesteps, step_index, noise_sampler)[-1]


@torch.no_grad()
def backward_simulations(
    predict_x0: PredictX0, schedule: NoiseSchedule, timesteps: Sequence[int], max_step: int, noise_sampler: NoiseSampler
) -> Tensor:
    """B(t_i) for every i up to `max_step`, of the same samples, in `max_step` forwards; float32 (deepest + 1, B, C, h, w)."""
    assert 0 <= max_step < len(timesteps), f"step {max_step} of {len(timesteps)} timesteps"
    inputs = [noise_sampler(0)]
    for k in range(max_step):
        x0 = predict_x0(inputs[k], timesteps_like(timesteps[k], inputs[k]))
        inputs.append(renoise(schedule, x0, timesteps[k + 1], noise_sampler(k + 1)))
    return torch.stack(inputs)


@torch.no_grad()
def denoise_to_clean(
    predict_x0: PredictX0,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    step_index: int,
    x0: Tensor,
    noise_sampler: NoiseSampler,
) -> Tensor:
    """Simulate on from the generator's output `x0` at timesteps[step_index] to its last step; clean float32 (B, C, h, w), no gradient.

    Asks draw_noise for k = step_index+1 .. len(timesteps)-1 only, none of which `backward_simulation` to the same step has used.
    """
    assert 0 <= step_index < len(timesteps), f"step {step_index} of {len(timesteps)} timesteps"
    x0 = upcast(x0.detach())
    for k in range(step_index + 1, len(timesteps)):
        noisy = renoise(schedule, x0, timesteps[k], noise_sampler(k))
        x0 = predict_x0(noisy, timesteps_like(timesteps[k], noisy))
    return x0


@torch.no_grad()
def few_step_sample(
    predict_x0: PredictX0, schedule: NoiseSchedule, timesteps: Sequence[int], noise_sampler: NoiseSampler
) -> Tensor:
    """The generator's samples, one forward per timestep: x0 float32 (B, C, h, w), the last forward's."""
    noise = noise_sampler(0)
    return denoise_to_clean(
        predict_x0, schedule, timesteps, 0, predict_x0(noise, timesteps_like(timesteps[0], noise)), noise_sampler
    )


def trailing_timesteps(steps: int, num_timesteps: int = 1000) -> tuple[int, ...]:
    """`steps` timesteps, evenly spaced and starting from the noisiest: 4 of 1000 are (999, 749, 499, 249).

    Raises ValueError unless 1 <= steps <= num_timesteps.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"sampling steps must be between 1 and {num_timesteps}, got {steps}")
    return tuple(round(num_timesteps - k * num_timesteps / steps) - 1 for k in range(steps))


def ddim_step(
    noisy: Tensor, x0: Tensor, current: tuple[Coefficient, Coefficient], following: tuple[Coefficient, Coefficient]
) -> Tensor:
    """Make one deterministic step from noisy = a_t x0 + s_t e to x_next = a_next x0 + s_next e, with the noise e = (noisy - a_t x0) / s_t.

    noisy, x0: (B, C, h, w). current, following: (a, s) of the two timesteps, numbers or (B, 1, 1, 1).
    """
    (a, s), (a_next, s_next) = current, following
    return a_next * x0 + s_next * ((noisy - a * x0) / s)


@torch.no_grad()
def ddim_sample(predict_x0: PredictX0, schedule: NoiseSchedule, steps: int, start_noise: Tensor) -> Tensor:
    """Deterministic sampling on `trailing_timesteps(steps)` from start_noise (B, C, h, w); the teacher's sampler.

        x_next = a_next x0 + s_next e,    e = (x_t - a_t x0) / s_t.

    On a VP schedule this is DDIM with eta 0. On a flow it is Euler on sigmas shift(1, 1-1/steps, .., 1/steps), 0, since then
    x_next = x_t + (s_next - s_t) v. Ends on the schedule's `final_coefficients`.
    """
    timesteps = trailing_timesteps(steps, schedule.num_timesteps)
    a, s = schedule.coefficients(torch.tensor(timesteps))
    pairs = list(zip(a.tolist(), s.tolist(), strict=True))
    noisy = upcast(start_noise)
    for t, current, following in zip(timesteps, pairs, [*pairs[1:], schedule.final_coefficients], strict=True):
        noisy = ddim_step(noisy, upcast(predict_x0(noisy, timesteps_like(t, noisy))), current, following)
    return noisy
