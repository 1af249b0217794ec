"""Networks that only have a price: in a dry step they stand where the real ones are called, and spend what a call of those costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from flashdmd_ray.data.image_source import RealLatents, Reals
from flashdmd_ray.data.tally import Tally
from flashdmd_ray.diffusion.schedule import NoiseSchedule, VPSchedule
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import TextTowers
from flashdmd_ray.models.latent_reward import NoisyLatentReward
from flashdmd_ray.models.rewards.base import BatchedReward
from flashdmd_ray.plan.costs import Cost, Use

META = torch.device("meta")
TO_INPUTS = 0.5
"""Of a backward's operations, what is left when no weight gets a gradient."""


class Spend(Protocol):
    """Takes down what a network's call costs: its part of the plan, operations in what precision, kernels and bytes at most."""

    def __call__(self, part: str, precision: str, flops: float, launches: float, peak: float) -> None: ...


def occupy(size: float) -> Tensor:
    """Occupy so many bytes, which count as long as the result lives."""
    return torch.empty(max(0, int(size)), dtype=torch.uint8, device=META)


class _Trained(torch.autograd.Function):
    """A forward that keeps what the network's graph keeps, and a backward that needs what its backward needs."""

    @staticmethod
    def forward(
        ctx: Any, samples: Tensor, anchor: Tensor, shape: Sequence[int], use: Use, part_of_backward: float, spend: Any
    ) -> Tensor:
        count = len(samples)
        spend(use.flops(count) / 3, use.launches(count) / 3, use.peak(count))
        ctx.flops, ctx.launches = part_of_backward * use.flops(count) * 2 / 3, use.launches(count) * 2 / 3
        ctx.kept = occupy(use.kept(count))
        ctx.more = use.peak(count) - use.kept(count)
        ctx.spend, ctx.like = spend, samples
        return torch.empty(*shape, device=META)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        occupy(ctx.more)
        ctx.kept = None
        to_samples, to_anchor = ctx.needs_input_grad[:2]
        ctx.spend(ctx.flops, ctx.launches, 0.0)
        anchor = torch.zeros(1) if to_anchor else None
        return torch.empty_like(ctx.like) if to_samples else None, anchor, None, None, None, None


class Priced(nn.Module):
    """A trained or frozen network. Its one parameter is real, so that the real engine trains it."""

    def __init__(self, part: str, precision: str, cost: Cost, spend: Spend, trained: bool = False) -> None:
        super().__init__()
        self.part, self.precision, self.cost, self._spend = part, precision, cost, spend
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=trained)

    def call(self, name: str, samples: Tensor, shape: Sequence[int]) -> Tensor:
        """The use `name` ("forward": with "training" where a gradient is wanted), float32 of `shape` on the meta device."""
        use = self.cost.uses[name]
        wants = torch.is_grad_enabled() and (self.anchor.requires_grad or samples.requires_grad)
        if wants:
            use = self.cost.uses[{"forward": "training"}.get(name, name)]
            alone = TO_INPUTS if name == "mid" and samples.requires_grad else 1.0
            made: Tensor = _Trained.apply(samples, self.anchor, shape, use, alone, self.spent)
            return made
        count = len(samples)
        self.spent(use.flops(count), use.launches(count), use.peak(count))
        occupy(use.peak(count))
        return torch.empty(*shape, device=META)

    def spent(self, flops: float, launches: float, peak: float) -> None:
        """Take a call down."""
        self._spend(self.part, self.precision, flops, launches, peak)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A frozen copy of the generator is the reference policy."""
        return type(self)("reference policy", self.precision, self.cost, self._spend, **self._sizes())

    def _sizes(self) -> dict[str, Any]:
        return {}


class PricedDenoiser(Priced, Denoiser):
    """Stands for a `Denoiser`. mid: channels, height and width of its mid block."""

    def __init__(
        self,
        part: str,
        precision: str,
        cost: Cost,
        spend: Spend,
        trained: bool = False,
        mid: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__(part, precision, cost, spend, trained)
        self._mid = mid

    def _sizes(self) -> dict[str, Any]:
        return {"mid": self._mid}

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.call("forward", noisy, noisy.shape)

    def mid_features(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.call("mid", noisy, (len(noisy), *self._mid))

    @classmethod
    def empty_conditioning(cls, config: Mapping[str, Any], count: int, tokens: int) -> Conditioning:
        raise AssertionError("a stand-in reads any conditioning")

    @property
    def mid_width(self) -> int:
        return self._mid[0]

    @property
    def network(self) -> Any:
        raise AssertionError("a stand-in has no stock network")


class PricedJudge(Priced):
    """Stands for a `PixelDiscriminator` with so many logits an image."""

    def __init__(self, precision: str, cost: Cost, spend: Spend, logits: int) -> None:
        super().__init__("discriminator: SAM", precision, cost, spend, trained=True)
        self._logits = logits

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        name = "towards" if images.requires_grad else "training"
        return self.call(name, images, (len(images), self._logits))


class PricedTowers(TextTowers):
    """Text encoders: the real cache and groups, embeddings without values."""

    def __init__(
        self, conditioning: Callable[[int], Conditioning], precision: str, flops: float, spend: Spend, stored: bool
    ) -> None:
        super().__init__()
        self._conditioning, self._precision, self._flops, self._spend = conditioning, precision, flops, spend
        self._place = nn.Parameter(torch.zeros(1), requires_grad=False)
        if stored:
            self.stored = lambda texts: {text: self._rows(1, 0) for text in texts}

    def _rows(self, count: int, *index: int) -> tuple[Tensor, ...]:
        found = self._conditioning(count)
        columns = [found.prompt_embeds] if found.pooled is None else [found.prompt_embeds, found.pooled]
        return tuple(column[index] if index else column for column in columns)

    def encode_group(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        self._spend("text encoders", self._precision, len(texts) * self._flops, 0.0, 0.0)
        return self._rows(len(texts))


class PricedFamily:
    """Stands for a `Family`: the sizes of its latents, images and embeddings, and the prices of its networks."""

    device = torch.device("cpu")
    path = "a plan"

    def __init__(
        self,
        latent: tuple[int, int, int],
        image: tuple[int, int],
        teacher: PricedDenoiser,
        vae: Priced,
        towers: PricedTowers,
        conditioning: Callable[[int], Conditioning],
    ) -> None:
        self.latent_shape, self.image_size = latent, image
        self.teacher, self.text = teacher, towers
        self.schedule: NoiseSchedule = VPSchedule(torch.linspace(0.99, 0.01, 1000))  # any: its numbers meet none
        self._vae, self._conditioning = vae, conditioning

    def load(self, parts: object) -> Self:
        return self

    def encode(self, texts: Sequence[str]) -> Conditioning:
        rows = self.text(texts)
        blank = self._conditioning(len(texts))
        return Conditioning(rows[0], rows[1] if len(rows) > 1 else None, blank.time_ids)

    def unconditional(self, count: int) -> Conditioning:
        return self._conditioning(count)

    def decode(self, latents: Tensor) -> Tensor:
        return self._vae.call("forward", latents, (len(latents), 3, *self.image_size))

    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._vae.call("encode", images, (len(images), *self.latent_shape))


class PricedImages:
    """An `ImageSource` of images without values; every prompt is another one."""

    def __init__(self, latent: tuple[int, int, int], stored: bool) -> None:
        """stored: the images' latents were computed before."""
        self._latent, self._stored = latent, stored

    def __len__(self) -> int:
        return 2**31

    def prompts(self, stream: str, positions: Tensor) -> tuple[str, ...]:
        return tuple(f"{stream} {position}" for position in positions.tolist())

    def reals(self, positions: Tensor, size: tuple[int, int]) -> Reals:
        return Reals(torch.empty(len(positions), 3, *size, device=META), self.prompts("reals", positions))

    def latents(self, positions: Tensor, size: tuple[int, int], encode: Callable[[Tensor], Tensor]) -> RealLatents:
        if self._stored:
            values = torch.empty(len(positions), *self._latent, device=META)
        else:
            values = encode(self.reals(positions, size).images)
        return RealLatents(values, self.prompts("reals", positions))

    def report(self) -> Tally:
        return Tally()


class PricedReward(BatchedReward):
    """A reward on images; `use` is None for one that nothing is known of."""

    def __init__(self, label: str, precision: str, use: Use | None, batch: int, spend: Spend) -> None:
        super().__init__()
        self.name, self.batch, self._precision, self._use, self._spend = label, batch, precision, use, spend

    def score_batch(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        if self._use is not None:
            count, use = len(texts), self._use
            self._spend(f"reward: {self.name}", self._precision, use.flops(count), use.launches(count), use.peak(count))
            occupy(use.peak(count))
        return torch.empty(len(texts), device=META)


class PricedLatentReward(NoisyLatentReward):
    """A reward on noisy latents, in float32. calls: forwards of one score."""

    def __init__(self, label: str, use: Use, calls: int, parts: Collection[str], spend: Spend) -> None:
        """parts: what it asks of the teacher's family."""
        super().__init__()
        self._label, self._use, self._calls, self._parts, self._spend = label, use, calls, parts, spend

    def score(self, noisy: Tensor, timesteps: Tensor, texts: Sequence[str], family: Any) -> Tensor:
        conditioning = family.encode(texts) if "text" in self._parts else None
        if "denoiser" in self._parts:
            family.teacher(noisy, timesteps, conditioning)
        count, use = len(noisy), self._use
        flops, launches = self._calls * use.flops(count), self._calls * use.launches(count)
        self._spend(f"reward: {self._label}", "float32", flops, launches, use.peak(count))
        occupy(use.peak(count))
        return torch.empty(count, device=META)
