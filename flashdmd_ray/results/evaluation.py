"""Metrics of samples: Frechet distance, prompt accuracy, rewards and diversity, whatever of these the data allow.

A judge of prompts is never optimised; a reward may be, and then only says how far optimisation went.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from flashdmd_ray.models.family import Family
from flashdmd_ray.models.rewards import PixelReward
from flashdmd_ray.results.evaluation_data import Reference
from flashdmd_ray.roles.image_sampling import Sampler, sample_images
from flashdmd_ray.run.progress import still

DIVERSITY_PROMPTS, DIVERSITY_NOISES = 32, 4
MOST_AT_ONCE = 8
"""Batches that are drawn side by side: each needs memory of its own."""

Say = Callable[[str], None]
Features = Callable[[Tensor], Tensor]
"""images (B, 3, H, W) in [-1, 1] -> float32 (B, F)."""


@dataclass(frozen=True)
class EvalMetrics:
    """Functions that measure samples. One that is None or empty has no column.

    features: the space of Frechet distance and diversity, space its name. correct: (images, prompts) -> bool (B,), does
    the image show what its prompt says? optimised: the labels of those rewards that training raised.
    """

    space: str = ""
    features: Features | None = None
    correct: Callable[[Tensor, list[str]], Tensor] | None = None
    rewards: Mapping[str, PixelReward] | None = None
    optimised: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One line of the table; None for what was not measured.

    nfe: network forwards per sample. diversity: mean distance, in the space of features, between samples of one prompt from different
    noises. margins: half the width of the 95 % interval, over the prompts, of the accuracy and of each reward. wins: by reward, the share
    of prompts for which it is higher than for the first sampler, a tie counting half; the first sampler and real images have none.
    """

    name: str
    nfe: int
    samples: int
    frechet: float | None
    accuracy: float | None
    rewards: Mapping[str, float]
    diversity: float | None
    margins: Mapping[str, float] = field(default_factory=dict)
    wins: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The table. prompts: what the prompts are called. space, optimised: as in `EvalMetrics`; space is empty without distances."""

    rows: Sequence[Row]
    prompts: str
    space: str
    optimised: Sequence[str]


def evaluate(
    family: Family,
    samplers: Sequence[Sampler],
    reference: Reference,
    eval_metrics: EvalMetrics,
    seed: int,
    batch: int,
    say: Say = print,
) -> Comparison:
    """One row for other real images of the very prompts, where there are such (what a perfect sampler would reach), then one per sampler.

    All samplers see the same prompts and the same noise, a function of `seed` and position; `batch` changes only the speed.
    Frechet distances depend on the number of samples: compare only rows of equal `samples`.
    """
    evaluation = _Evaluation(family, reference, eval_metrics, seed, batch, say)
    rows = [] if reference.twins is None else [evaluation.real_row(reference.twins)]
    for sampler in samplers:
        rows.append(evaluation.row(sampler))
        say(f"{sampler.name}: {', '.join(' '.join(pair) for pair in figures(rows[-1]).items())}")
    space = "" if eval_metrics.features is None else eval_metrics.space
    return Comparison(rows, reference.prompts, space, tuple(eval_metrics.optimised))


class _Evaluation:
    """One evaluation: prompts, metrics and seed that all of its rows share."""

    def __init__(
        self, family: Family, reference: Reference, eval_metrics: EvalMetrics, seed: int, batch: int, say: Say
    ) -> None:
        self.family = family
        self.texts = reference.texts
        self.eval_metrics = eval_metrics
        self.seed = seed
        self.batch = batch
        self.say = say
        self.first: Mapping[str, Tensor] | None = None
        """Values per image of the first sampler."""
        measured = eval_metrics.features is not None
        self.repeated = [t for t in self.texts[:DIVERSITY_PROMPTS] for _ in range(DIVERSITY_NOISES) if measured]
        features = [self._features(images) for images in reference.reals] if measured else []
        self.reals = torch.cat(features) if features else None
        if self.reals is not None and len(self.texts) <= self.reals.shape[1]:
            say(f"no Frechet distance: it needs evaluation.samples above {self.reals.shape[1]}, the number of features")

    @torch.no_grad()
    def row(self, sampler: Sampler) -> Row:
        """Draw and judge a sample of each text, and measure the diversity of several for each of the first texts, whose noises follow."""
        texts = [*self.texts, *self.repeated]
        batches = sample_images(
            self.family, sampler, texts, range(len(texts)), self.seed, self.batch, _batches_at_once(self.family)
        )
        parts, repeated, done = [], [], 0
        with still(self.say, lambda: f"{sampler.name}: {done} of {len(texts)} samples"):
            for images in batches:
                judged = self.texts[done : done + len(images)]
                if judged:
                    parts.append(self._judge(images[: len(judged)], judged))
                if len(judged) < len(images):
                    repeated.append(self._features(images[len(judged) :]))
                done += len(images)
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        groups = torch.cat(repeated).unflatten(0, (-1, DIVERSITY_NOISES)) if repeated else None
        diversity = None if groups is None else mean_pairwise_distance(groups)
        row = self._row(sampler.name, sampler.nfe, columns, diversity, self.first)
        self.first = self.first or columns
        return row

    @torch.no_grad()
    def real_row(self, twins: Tensor) -> Row:
        """The row of real images of the same prompts."""
        parts = [self._judge(*one) for one in zip(twins.split(self.batch), self._chunks(self.texts), strict=True)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        diversity = None
        if self.reals is not None:
            diversity = mean_pairwise_distance(torch.stack([self.reals, columns["features"]], dim=1))
        return self._row("real images", 0, columns, diversity)

    def _judge(self, images: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Values per image, by column."""
        eval_metrics, values = self.eval_metrics, {}
        if eval_metrics.features is not None:
            values["features"] = self._features(images)
        if eval_metrics.correct is not None:
            values["correct"] = eval_metrics.correct(images, list(texts)).float()
        for label, reward in (eval_metrics.rewards or {}).items():
            values[f"reward/{label}"] = reward.score(images, texts).cpu()
        return values

    def _row(
        self,
        name: str,
        nfe: int,
        columns: Mapping[str, Tensor],
        diversity: float | None,
        first: Mapping[str, Tensor] | None = None,
    ) -> Row:
        rewards = {label: columns[f"reward/{label}"] for label in self.eval_metrics.rewards or {}}
        judged = rewards | ({"accuracy": columns["correct"]} if "correct" in columns else {})
        return Row(
            name,
            nfe,
            len(self.texts),
            None if self.reals is None else fid(columns["features"], self.reals),
            columns["correct"].mean().item() if "correct" in columns else None,
            {label: values.mean().item() for label, values in rewards.items()},
            diversity,
            {key: margin(values) for key, values in judged.items()},
            {} if first is None else {key: wins(values, first[f"reward/{key}"]) for key, values in rewards.items()},
        )

    def _features(self, images: Tensor) -> Tensor:
        assert self.eval_metrics.features is not None
        return self.eval_metrics.features(images).cpu()

    def _chunks(self, texts: Sequence[str]) -> list[Sequence[str]]:
        return [texts[start : start + self.batch] for start in range(0, len(texts), self.batch)]


def _batches_at_once(family: Family) -> int:
    """Batches that the cores of this machine draw side by side; a GPU draws one after the other."""
    if family.device.type != "cpu":
        return 1
    return max(1, min(MOST_AT_ONCE, len(os.sched_getaffinity(0)) // torch.get_num_threads()))


def margin(values: Tensor) -> float:
    """Half the width of the 95 % interval of the mean of `values`, float (N,), N >= 2: 1.96 standard errors."""
    return (1.96 * values.double().std() / len(values) ** 0.5).item()


def wins(values: Tensor, others: Tensor) -> float:
    """Share of places at which `values` is higher than `others`, float (N,) both; a tie counts half."""
    return ((values > others).double().mean() + (values == others).double().mean() / 2).item()


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean Euclidean distance between different members of a group, over all groups; features float (G, K, F), K >= 2."""
    count = features.shape[1]
    distances = torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return (distances.sum(dim=(1, 2)) / (count * (count - 1))).mean().item()


def fid(features: Tensor, reals: Tensor) -> float | None:
    """Frechet distance; None unless there are more samples than features: else their covariance has no full rank."""
    if min(len(features), len(reals)) <= features.shape[1]:
        return None
    return frechet_distance(features, reals)


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


def print_table(table: Comparison, console: Console | None = None) -> None:
    """The rows as a table that also reads well in a log."""
    printed = Table(box=box.MARKDOWN, title=escape(title(table)))
    printed.add_column("sampler", no_wrap=True)
    for heading in ("NFE", *figures(table.rows[0], table.optimised)):
        printed.add_column(escape(heading), justify="right")
    for row in table.rows:
        printed.add_row(row.name, str(row.nfe) if row.nfe else "-", *figures(row).values())
    (console or Console(width=110)).print(printed)


def title(table: Comparison) -> str:
    """Title of the table: number and kind of the prompts, the space of the distances, which rewards were optimised."""
    facts = [f"{table.rows[0].samples} {table.prompts}"]
    if table.space:
        facts.append(f"distances between {table.space}")
    if table.optimised:
        facts.append("* optimised in training")
    return "; ".join(facts)


def figures(row: Row, marked: Collection[str] = ()) -> dict[str, str]:
    """The row's values as text, by heading; those of `marked` rewards get an asterisk."""
    values = {} if row.frechet is None else {"Frechet distance": f"{row.frechet:.4g}"}
    others = {"prompt accuracy": row.accuracy}
    others |= {f"{label}{'*' if label in marked else ''}": value for label, value in row.rewards.items()}
    others |= {"diversity": row.diversity}
    return values | {name: f"{value:.3f}" for name, value in others.items() if value is not None}


def as_record(row: Row) -> dict[str, object]:
    """The row as JSON values, without what was not measured."""
    return {name: value for name, value in asdict(row).items() if value is not None}


def as_json(table: Comparison) -> dict[str, object]:
    """The table as JSON values."""
    return asdict(table) | {"rows": [as_record(row) for row in table.rows]}
