"""One distillation step as a straight-line torch script: no roles, no engine, no driver. benchmarks/learner_step.py compares with it.

It does the work of the driver's `distil` on the same networks with the same batch, and nothing else: plain modules, plain AdamW, noise
drawn for the whole batch at once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashdmd_ray.models.discriminator import PixelDiscriminator
from flashdmd_ray.models.family import Family
from flashdmd_ray.roles.latent_adversary import DenoiserWithHead

TIMESTEPS = (999, 749, 499, 249)
RENOISE = (20, 981)


class FlashDMD:
    """Timestep-aware distribution matching with a pixel GAN; the discriminator's and the score estimator's update once per step."""

    def __init__(self, family: Family, discriminator: PixelDiscriminator, guidance: float, ema: float) -> None:
        self.family, self.guidance, self.ema = family, guidance, ema
        alphas = torch.tensor([family.schedule.coefficients(torch.tensor([t])) for t in range(1000)])
        self.a, self.s = alphas[:, 0].view(-1, 1, 1, 1), alphas[:, 1].view(-1, 1, 1, 1)
        self.teacher = family.teacher
        self.generator, self.score, self.discriminator = family.denoiser(), family.denoiser(), discriminator
        self.opt_generator = torch.optim.AdamW(self.generator.parameters(), lr=1e-6, fused=True)
        self.opt_score = torch.optim.AdamW(self.score.parameters(), lr=1e-6, fused=True)
        self.heads = [p for p in discriminator.parameters() if p.requires_grad]
        self.opt_heads = torch.optim.AdamW(self.heads, lr=1e-6, fused=True)

    def x0(self, network: nn.Module, noisy: Tensor, t: Tensor, conditioning: object) -> Tensor:
        return (noisy - self.s[t] * network(noisy, t, conditioning)) / self.a[t]

    def noised(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a[t] * x + self.s[t] * torch.randn_like(x)

    def step(self, texts: Sequence[str], reals: Tensor, levels: Tensor) -> None:
        """Make one update of everything. levels: int64 (B,), the step of each sample's high-noise forward."""
        count, max_step = len(texts), int(levels.max())
        conditioning, blank = self.family.encode(texts), self.family.unconditional(count)

        def at(t: int) -> Tensor:
            return torch.full((count,), t)

        with torch.no_grad():
            inputs = [torch.randn(count, *self.family.latent_shape)]
            for k in range(max_step):
                x = self.x0(self.generator, inputs[k], at(TIMESTEPS[k]), conditioning)
                inputs.append(self.noised(x, at(TIMESTEPS[k + 1])))
        noisy = torch.stack(inputs)[levels, torch.arange(count)]
        high_noise = self.x0(self.generator, noisy, torch.tensor(TIMESTEPS)[levels], conditioning)
        with torch.no_grad():
            x = self.x0(self.generator, inputs[max_step], at(TIMESTEPS[max_step]), conditioning)
            for k in range(max_step + 1, len(TIMESTEPS)):
                x = self.x0(self.generator, self.noised(x, at(TIMESTEPS[k])), at(TIMESTEPS[k]), conditioning)
            low = self.noised(x, at(TIMESTEPS[-1]))
        low_noise = self.x0(self.generator, low, at(TIMESTEPS[-1]), conditioning)

        with torch.no_grad():
            t = torch.randint(*RENOISE, (count,))
            noisy = self.noised(high_noise.detach(), t)
            real, unconditional = (self.x0(self.teacher, noisy, t, c) for c in (conditioning, blank))
            real = unconditional + self.guidance * (real - unconditional)
            fake = self.x0(self.score, noisy, t, conditioning)
            scale = (high_noise - real).abs().mean(dim=(1, 2, 3), keepdim=True)
            matching = (fake - real) / (scale + 1e-6) / high_noise.numel()
        latents = low_noise.detach().requires_grad_()
        (realism,) = torch.autograd.grad(-self.discriminator(self.family.decode(latents), None).mean(), latents)
        weight = matching.norm() / realism.norm()

        ((high_noise * matching).sum() + (low_noise * (weight * realism)).sum()).backward()
        update(self.opt_generator, list(self.generator.parameters()))
        ema_update(self.score, self.generator, self.ema)

        x, t = high_noise.detach(), torch.randint(0, 1000, (count,))
        noise = torch.randn_like(x)
        F.mse_loss(self.score(self.a[t] * x + self.s[t] * noise, t, conditioning), noise).backward()
        update(self.opt_score, list(self.score.parameters()))

        with torch.no_grad():
            images = torch.cat([reals, self.family.decode(low_noise.detach())])
        real_logits, fake_logits = self.discriminator(images, None).chunk(2)
        (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()).backward()
        update(self.opt_heads, self.heads)


class DMD2:
    """The baseline: both losses on one forward at any timestep, the head on the score estimator's mid block, no EMA update."""

    def __init__(self, family: Family, head: DenoiserWithHead, guidance: float, ttur: int) -> None:
        self.family, self.guidance, self.ttur = family, guidance, ttur
        alphas = torch.tensor([family.schedule.coefficients(torch.tensor([t])) for t in range(1000)])
        self.a, self.s = alphas[:, 0].view(-1, 1, 1, 1), alphas[:, 1].view(-1, 1, 1, 1)
        self.teacher, self.generator, self.score = family.teacher, family.denoiser(), copy.deepcopy(head)
        self.opt_generator = torch.optim.AdamW(self.generator.parameters(), lr=1e-6, fused=True)
        self.opt_score = torch.optim.AdamW(self.score.parameters(), lr=1e-6, fused=True)

    def x0(self, network: nn.Module, noisy: Tensor, t: Tensor, conditioning: object) -> Tensor:
        return (noisy - self.s[t] * network(noisy, t, conditioning)) / self.a[t]

    def noised(self, x: Tensor, t: Tensor) -> Tensor:
        return self.a[t] * x + self.s[t] * torch.randn_like(x)

    def simulate(self, conditioning: object, count: int, high: int) -> Tensor:
        """The input of the generator at TIMESTEPS[high]."""
        with torch.no_grad():
            noisy = torch.randn(count, *self.family.latent_shape)
            for k in range(high):
                t = torch.full((count,), TIMESTEPS[k])
                x = self.x0(self.generator, noisy, t, conditioning)
                noisy = self.noised(x, torch.full((count,), TIMESTEPS[k + 1]))
        return noisy

    def step(self, batches: Sequence[tuple[Sequence[str], Tensor, Sequence[str], int]]) -> None:
        """Make one update of everything. batches: for each critic update the prompts, real images, their captions and the step index."""
        texts, _, _, high = batches[0]
        count = len(texts)
        conditioning, blank = self.family.encode(texts), self.family.unconditional(count)
        at = torch.full((count,), TIMESTEPS[high])
        x = self.x0(self.generator, self.simulate(conditioning, count, high), at, conditioning)
        with torch.no_grad():
            t = torch.randint(*RENOISE, (count,))
            noisy = self.noised(x.detach(), t)
            real, unconditional = (self.x0(self.teacher, noisy, t, c) for c in (conditioning, blank))
            real = unconditional + self.guidance * (real - unconditional)
            fake = self.x0(self.score.denoiser, noisy, t, conditioning)
            scale = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
            matching = (fake - real) / (scale + 1e-6) / x.numel()
        latents, t = x.detach().requires_grad_(), torch.randint(0, 1000, (count,))
        logits = self.score.logits(self.noised(latents, t), t, conditioning)
        (realism,) = torch.autograd.grad(F.softplus(-logits).mean(), latents)
        (x * (matching + 5e-3 * realism)).sum().backward()
        update(self.opt_generator, list(self.generator.parameters()))
        self.update_score(x.detach(), conditioning, *batches[0][1:3])
        for texts, reals, captions, high in batches[1:]:
            conditioning = self.family.encode(texts)
            noisy = self.simulate(conditioning, count, high)
            with torch.no_grad():
                x = self.x0(self.generator, noisy, torch.full((count,), TIMESTEPS[high]), conditioning)
            self.update_score(x, conditioning, reals, captions)

    def update_score(self, x: Tensor, conditioning: object, reals: Tensor, captions: Sequence[str]) -> None:
        t = torch.randint(0, 1000, (len(x),))
        noise = torch.randn_like(x)
        noisy = self.a[t] * x + self.s[t] * noise
        real_latents = self.family.encode_images(reals)
        both = type(conditioning).concat([self.family.encode(captions), conditioning])  # type: ignore[attr-defined]
        judged = (torch.cat([self.noised(real_latents, t), noisy]), t.repeat(2), both)
        prediction, logits = self.score(noisy, t, conditioning, judged)
        real_logits, fake_logits = logits.chunk(2)
        adversarial = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        (F.mse_loss(prediction, noise) + 1e-2 * adversarial).backward()
        update(self.opt_score, list(self.score.parameters()))


def update(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Clip the gradients, step, clear the gradients."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def ema_update(score: nn.Module, generator: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(score.parameters()), list(generator.parameters()), 1 - decay)
