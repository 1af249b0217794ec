"""Tables of folders of images: means with bootstrap intervals, distances to real images, and paired differences between models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from flashdmd_ray.results.evaluation import fid, mean_pairwise_distance, wins

RESAMPLES = 2000
KID_SUBSETS, KID_SIZE = 100, 1000
CMMD_SIGMA = 10.0


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Tensor) -> Interval:
    """95 % interval of the mean of `values` float (N,), by percentiles of resampled means. One value has no interval: it is the value."""
    mean = values.double().mean().item()
    if len(values) < 2 or bool((values == values[0]).all()):
        return Interval(mean, mean, mean)
    data = (values.double().numpy(),)
    found = stats.bootstrap(data, np.mean, n_resamples=RESAMPLES, method="percentile", rng=0, batch=100)
    return Interval(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


@dataclass(frozen=True)
class Paired:
    """One model against another on the same prompts and noise. wins: share of prompts with the higher score, a tie counts half."""

    difference: Interval
    wins: float
    p: float


def paired(values: Tensor, others: Tensor) -> Paired:
    """Differences `values` - `others`, float (N,) both, with the p-value of Wilcoxon's signed-rank test (1 where all are equal)."""
    assert values.shape == others.shape
    gaps = (values - others).double()
    p = 1.0 if bool((gaps == 0).all()) else float(stats.wilcoxon(gaps.numpy()).pvalue)
    return Paired(bootstrap_mean(gaps), wins(values, others), p)


def distances(
    columns: Mapping[str, Mapping[str, Tensor]], reals: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float | None]:
    """Distances between judged images and judged real ones, by judge: None where there are too few samples.

    FID, patch FID and KID of Inception features, CMMD of the embeddings of each reward that has such.
    """
    found: dict[str, float | None] = {}
    for judge, theirs in reals.items():
        mine = columns[judge]
        if judge != "inception":
            if "features" in mine:
                found[f"CMMD ({judge})"] = cmmd(mine["features"], theirs["features"])
            continue
        found["FID"] = fid(mine["features"], theirs["features"])
        if "patches" in mine:
            found["patch FID"] = fid(mine["patches"], theirs["patches"])
        found["KID x 1000"] = kid(mine["features"], theirs["features"])
    return found


def kid(features: Tensor, reals: Tensor) -> float | None:
    """1000 x the kernel distance, mean over 100 subsets of 1,000; None for fewer samples."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    if min(len(features), len(reals)) < KID_SIZE:
        return None
    found = kid_features_to_metric(
        features, reals, kid_subsets=KID_SUBSETS, kid_subset_size=KID_SIZE, rng_seed=2020, verbose=False
    )
    return 1000 * float(found[KEY_METRIC_KID_MEAN])


def cmmd(features: Tensor, reals: Tensor) -> float | None:
    """1000 x the squared maximum mean discrepancy of unit embeddings (N, F) and (M, F), biased, Gaussian kernel of width 10.

    Jayasumana et al., arXiv 2401.09603. None for fewer than two samples.
    """
    if min(len(features), len(reals)) < 2:
        return None
    x, y = features.double(), reals.double()

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        rows = [torch.exp(-(torch.cdist(part, b) ** 2) / (2 * CMMD_SIGMA**2)).sum() for part in a.split(1000)]
        return torch.stack(rows).sum() / (len(a) * len(b))

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).item()


def means(columns: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Interval]:
    """Mean score of every judge that scores."""
    return {judge: bootstrap_mean(mine["score"]) for judge, mine in columns.items() if "score" in mine}


def diversity(mine: Mapping[str, Tensor], prompts: Sequence[str]) -> float | None:
    """Mean distance between images of one prompt, by LPIPS or by embeddings; None when no prompt has two images."""
    if "diversity" in mine:
        found = mine["diversity"].nanmean().item()
        return None if math.isnan(found) else found
    features = mine["features"]
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(number)
    means = [mean_pairwise_distance(features[rows][None]) for rows in groups.values() if len(rows) > 1]
    return statistics.fmean(means) if means else None
