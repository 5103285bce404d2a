"""Means with bootstrap intervals over the images, and paired differences between two columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEAST = 5  # of fewer images a bootstrap says almost nothing: two of the same sign would always be "beyond chance"


@dataclass(frozen=True)
class Mean:
    """Mean over the images that have a number, and its 95 % bootstrap interval (nan for fewer than LEAST images)."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Second column minus first over the same images; `better` counts the images on which the second column is better."""

    mean: float
    low: float
    high: float
    count: int
    better: int


def mean_with_interval(values: NDArray[np.float64]) -> Mean:
    """Percentile bootstrap of the mean, 10 000 resamples, always the same random numbers   (Efron 1979)."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    low, high = _interval(values)
    return Mean(float(values.mean()), low, high, len(values))


def difference(first: NDArray[np.float64], second: NDArray[np.float64], *, higher_is_better: bool) -> Difference:
    """Mean of second - first over the images that have both numbers, with its interval."""
    with np.errstate(invalid="ignore"):
        change = second - first  # two infinite PSNRs: nan, left out
    change = change[~np.isnan(change)]
    found = mean_with_interval(change)
    better = int(((change > 0) if higher_is_better else (change < 0)).sum())
    return Difference(found.mean, found.low, found.high, found.count, better)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    if len(values) < LEAST or not np.isfinite(values).all():
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = np.concatenate([values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1) for _ in range(RESAMPLES // 100)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
