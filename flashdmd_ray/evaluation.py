"""How good samples are: Frechet distance, prompt accuracy, reward and diversity, on held-out captions and held-out noise.

The judge (features and prompt accuracy) is never optimised; the reward may be, and then only says how far optimisation went.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashdmd_ray.batch import derive_seed
from flashdmd_ray.diffusion.sampling import DrawNoise, ddim_sample, few_step_sample, guided
from flashdmd_ray.models.denoiser import Conditioning, Denoiser
from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards import PixelReward
from flashdmd_ray.roles.networks import bind

DIVERSITY_PROMPTS, DIVERSITY_NOISES = 32, 4

Say = Callable[[str], None]


class Judge(Protocol):
    """Looks at images (B, 3, H, W) in [-1, 1]."""

    def features(self, images: Tensor) -> Tensor:
        """float32 (B, F), the space of Frechet distance and diversity."""
        ...

    def correct(self, images: Tensor, prompts: list[str]) -> Tensor:
        """bool (B,): does the image show what its prompt says?"""
        ...


@dataclass(frozen=True)
class HeldOut:
    """What samples are compared with: captions, their real images, and other real images of the same captions.

    images, twins: float32 (N, 3, H, W) in [-1, 1].
    """

    texts: tuple[str, ...]
    images: Tensor
    twins: Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table. nfe: network forwards per sample. diversity: mean distance, in the judge's features, between
    samples of one prompt from different noises."""

    name: str
    nfe: int
    frechet: float
    accuracy: float
    reward: float
    diversity: float
    samples: int


@dataclass(frozen=True)
class Sampler:
    """A way to make samples. sample(conditioning of B prompts, draw_noise) -> clean latents float32 (B, C, h, w)."""

    name: str
    nfe: int
    sample: Callable[[Conditioning, DrawNoise], Tensor]


class SampleNoise:
    """The noise of samples `indices` (global positions): draw(k) is the k-th draw of each sample's own generator.

    It depends on (seed, index, k) alone, not on the batch, and it is what a diffusers pipeline draws when it is given
    `generator=[torch.Generator().manual_seed(seed_of(seed, i)) for i in indices]`. Ask for k = 0, 1, 2, ... in turn.
    """

    def __init__(self, indices: Sequence[int], shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed_of(seed, index)) for index in indices]
        self._shape = shape
        self._device = device
        self._asked = 0

    def __call__(self, hop: int) -> Tensor:
        assert hop == self._asked, f"noise of hop {hop} asked for when {self._asked} is next"
        self._asked += 1
        rows = [torch.randn(self._shape, generator=generator) for generator in self._generators]
        return torch.stack(rows).to(self._device)


def seed_of(seed: int, index: int) -> int:
    """Seed of sample `index` in an evaluation with `seed`."""
    return derive_seed(seed, "evaluation", index)


def teacher_sampler(family: Family, steps: int, guidance_scale: float) -> Sampler:
    """The frozen teacher, deterministic, with classifier-free guidance (two forwards per step unless the scale is 1)."""

    def sample(conditioning: Conditioning, draw_noise: DrawNoise) -> Tensor:
        unconditional = family.unconditional(len(conditioning))
        predict_x0 = guided(
            bind(family.teacher, family.schedule, conditioning),
            bind(family.teacher, family.schedule, unconditional),
            guidance_scale,
        )
        return ddim_sample(predict_x0, family.schedule, steps, draw_noise(0))

    name = f"teacher, {steps} steps, guidance {guidance_scale:g}"
    return Sampler(name, steps * (1 if guidance_scale == 1 else 2), sample)


def student_sampler(name: str, family: Family, network: Denoiser, timesteps: Sequence[int]) -> Sampler:
    """A few-step generator without guidance. With the teacher as `network` it is the student before distillation."""

    def sample(conditioning: Conditioning, draw_noise: DrawNoise) -> Tensor:
        return few_step_sample(bind(network, family.schedule, conditioning), family.schedule, timesteps, draw_noise)

    count = len(timesteps)
    return Sampler(f"{name}, {count} {'step' if count == 1 else 'steps'}", count, sample)


def every_kth(timesteps: Sequence[int], steps: int) -> tuple[int, ...]:
    """`steps` of the denoising timesteps, evenly spaced from the first: 2 of (999, 749, 499, 249) are (999, 499).

    Raises ValueError unless `steps` divides their number.
    """
    if steps < 1 or len(timesteps) % steps:
        raise ValueError(f"{steps} steps are not evenly spaced among the {len(timesteps)} timesteps {list(timesteps)}")
    return tuple(timesteps[:: len(timesteps) // steps])


@torch.no_grad()
def sample_images(
    family: Family, sampler: Sampler, texts: Sequence[str], indices: Sequence[int], seed: int, batch: int
) -> Iterator[Tensor]:
    """Images float32 (<= batch, 3, H, W) in [-1, 1], on the CPU, batch after batch; sample i uses noise `indices[i]`."""
    for start in range(0, len(texts), batch):
        chunk = slice(start, start + batch)
        draw_noise = SampleNoise(indices[chunk], family.latent_shape, seed, family.device)
        latents = sampler.sample(family.encode(texts[chunk]), draw_noise)
        yield family.decode(latents).clamp(-1, 1).cpu()


def evaluate(
    family: Family,
    samplers: Sequence[Sampler],
    held_out: HeldOut,
    judge: Judge,
    reward: PixelReward,
    seed: int,
    batch: int = 100,
    say: Say = print,
) -> list[Row]:
    """One row for other real images of the captions (what a perfect sampler would reach), then one for each sampler.

    All samplers see the same captions and the same noise, a function of `seed` and position; `batch` changes only the speed.
    Frechet distances depend on the number of samples: compare only rows of equal `samples`.
    """
    features = judge.features(held_out.images)
    count = len(held_out.texts)
    pairs = torch.stack([features, judge.features(held_out.twins)], dim=1)
    accuracy = judge.correct(held_out.twins, list(held_out.texts)).float().mean().item()
    with torch.no_grad():
        rewards = _in_batches(reward, held_out.twins, held_out.texts, batch)
    distance = frechet_distance(features, pairs[:, 1])
    rows = [Row("real images", 0, distance, accuracy, rewards, mean_pairwise_distance(pairs), count)]
    for sampler in samplers:
        rows.append(_measure(family, sampler, held_out.texts, features, judge, reward, seed, batch))
        say(f"{sampler.name}: Frechet distance {rows[-1].frechet:.2f}, prompt accuracy {rows[-1].accuracy:.3f}")
    return rows


def _in_batches(reward: PixelReward, images: Tensor, texts: Sequence[str], batch: int) -> float:
    parts = zip(images.split(batch), _chunks(texts, batch), strict=True)
    return torch.cat([reward.score(part, chunk).cpu() for part, chunk in parts]).mean().item()


def _chunks(texts: Sequence[str], size: int) -> list[Sequence[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _measure(
    family: Family,
    sampler: Sampler,
    texts: Sequence[str],
    reference: Tensor,
    judge: Judge,
    reward: PixelReward,
    seed: int,
    batch: int,
) -> Row:
    features, correct, rewards = [], [], []
    drawn = sample_images(family, sampler, texts, range(len(texts)), seed, batch)
    for images, chunk in zip(drawn, _chunks(texts, batch), strict=True):
        features.append(judge.features(images))
        correct.append(judge.correct(images, list(chunk)).float())
        with torch.no_grad():
            rewards.append(reward.score(images, chunk).cpu())
    return Row(
        sampler.name,
        sampler.nfe,
        frechet_distance(reference, torch.cat(features)),
        torch.cat(correct).mean().item(),
        torch.cat(rewards).mean().item(),
        _diversity(family, sampler, texts, judge, seed, batch),
        len(texts),
    )


def _diversity(family: Family, sampler: Sampler, texts: Sequence[str], judge: Judge, seed: int, batch: int) -> float:
    """Several noises for each of the first prompts; their noise indices follow those of the table's samples."""
    repeated = [text for text in texts[:DIVERSITY_PROMPTS] for _ in range(DIVERSITY_NOISES)]
    indices = range(len(texts), len(texts) + len(repeated))
    images = torch.cat(list(sample_images(family, sampler, repeated, indices, seed, batch)))
    return mean_pairwise_distance(judge.features(images).unflatten(0, (-1, DIVERSITY_NOISES)))


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance between different members of a group, over all groups; features float (G, K, F), K >= 2."""
    count = features.shape[1]
    distances = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return (distances.sum(dim=(1, 2)) / (count * (count - 1))).mean().item()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features, float (N, F) and (M, F), in float64:

        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)).

    Raises ValueError for fewer than two samples, different widths, or features that are not finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"two sets of at least 2 features are needed, got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    x, y = (features.detach().cpu().double() for features in (first, second))
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features are not finite: the samples or the feature network are broken")
    gap = x.mean(dim=0) - y.mean(dim=0)
    # C = R'R with R from a QR decomposition of the centred samples; the trace of the root is then the nuclear norm of Ry Rx',
    # which loses no digits to squaring and holds for fewer samples than features too.
    rx, ry = (torch.linalg.qr((z - z.mean(dim=0)) / (len(z) - 1) ** 0.5, mode="r").R for z in (x, y))
    cross = torch.linalg.svdvals(ry @ rx.T).sum()
    return max(0.0, (gap @ gap + rx.square().sum() + ry.square().sum() - 2 * cross).item())


def demo_held_out(count: int, seed: int) -> HeldOut:
    """`count` held-out digit scenes: captions and handwriting that no training part has seen."""
    from flashdmd_ray.demo.scenes import place, render, sample_scenes

    scenes = sample_scenes(count, "held_out", derive_seed(seed, "held-out scenes"))
    rng = np.random.default_rng(derive_seed(seed, "held-out twins"))
    twins = [place(scene.attributes, "held_out", rng) for scene in scenes]
    return HeldOut(tuple(scene.caption for scene in scenes), render(scenes)[0], render(twins)[0])


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """The rows as a table that also reads well in a log."""
    table = Table(box=box.MARKDOWN, title=f"{rows[0].samples} held-out prompts" if rows else None)
    table.add_column("sampler", no_wrap=True)
    for heading in ("NFE", "Frechet distance", "prompt accuracy", "reward", "diversity"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.nfe) if row.nfe else "-",
            f"{row.frechet:.2f}",
            f"{row.accuracy:.3f}",
            f"{row.reward:.3f}",
            f"{row.diversity:.3f}",
        )
    (console or Console(width=110)).print(table)


def as_records(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows as JSON values."""
    return [asdict(row) for row in rows]
